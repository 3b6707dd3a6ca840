"""What cannot be measured is refused with a message, or measured as NaN."""

import inspect

import numpy as np
import pytest

from flatjax import neural_collapse

from .cases import METRICS, measure, random_case

CASE = random_case((9, 1, 8, 6), 9)
FEATS, LABELS = CASE.feats, CASE.labels
# With the checks of jaxtyping, which this test run puts around it, our own would not see most of these.
unchecked = inspect.unwrap(neural_collapse)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_classes": 5}, ValueError, "num_classes is 5, but the head has 4 outputs, one a class"),
        ({"num_classes": 1}, ValueError, "num_classes is 1; there is nothing between fewer than 2 classes"),
        ({"num_classes": 0}, ValueError, "num_classes is 0; there is nothing between fewer than 2 classes"),
        ({"labels": 1.0 * LABELS}, TypeError, "labels has dtype float64 and shape (24,), wanted one"),
        ({"labels": LABELS > 0}, TypeError, "labels has dtype bool and shape (24,), wanted one"),
        (
            {"labels": np.eye(4)[LABELS]},
            TypeError,
            "labels has dtype float64 and shape (24, 4), wanted one",
        ),
        ({"labels": np.eye(4, dtype=int)[LABELS]}, TypeError, "labels has dtype int64 and shape (24, 4), wanted one"),
        ({"labels": LABELS[:6]}, ValueError, "labels has shape (6,), wanted (24,)"),
        (
            {"feats": FEATS[:, :5]},
            ValueError,
            "feats has shape (24, 5), but the head takes 9 features",
        ),
        ({"feats": FEATS[:0], "labels": LABELS[:0]}, ValueError, "feats has shape (0, 9), which holds no sample"),
        ({"feats": FEATS.astype(int)}, TypeError, "feats has dtype int64, wanted a floating dtype"),
        ({"weights": np.ones(6)}, ValueError, "weights has shape (6,), wanted (24,), one a sample"),
        ({"weights": np.ones((24, 1))}, ValueError, "weights has shape (24, 1), wanted (24,), one a sample"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(changes, error, message):
    arguments = {"params": CASE.params, "feats": FEATS, "labels": LABELS, "num_classes": 4} | changes
    with pytest.raises(error) as raised:
        unchecked(**arguments)
    assert message in str(raised.value)


def with_value(name, index, value):
    array = getattr(CASE, name).copy()
    array[index] = value
    return CASE._replace(**{name: array})


BAD_VALUES = {
    "label too large": with_value("labels", 4, 4),
    "label negative": with_value("labels", 2, -1),
    "feature NaN": with_value("feats", (23, 1), np.nan),
    "feature infinite": with_value("feats", (0, 4), -np.inf),
    "feature whose square is infinite": with_value("feats", (6, 0), 1e200),
    "weight negative": with_value("weights", 3, -1.0),
    "feature of a class left out": with_value("feats", (np.argmax(LABELS == 1), 2), np.inf),
    "first of two bad labels": with_value("labels", slice(7, None, 9), 9),
}


@pytest.mark.parametrize("case", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_leaves_no_metric_that_looks_like_one(case):
    assert [name for name in METRICS if not np.isnan(getattr(measure(case), name))] == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_leave_no_metric_that_looks_like_one(value):
    actual = measure(with_value("weights", 3, value))
    assert [name for name in METRICS if not np.isnan(getattr(actual, name))] == []


@pytest.mark.parametrize("name", ["kernel", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_head_leaves_no_metric_that_looks_like_one(name, value):
    actual = measure(with_value(name, 0, value))
    assert [name for name in METRICS if not np.isnan(getattr(actual, name))] == []


def test_a_dead_layer_has_the_metrics_of_its_classifier_alone():
    actual = measure(CASE._replace(feats=0 * FEATS))
    # The floor is of the number of classes.
    has_value = {name for name in METRICS if name.endswith("classifier")} | {"nc2_etf_floor"}
    assert {name for name in METRICS if not np.isnan(getattr(actual, name))} == has_value


@pytest.mark.parametrize("signs", [9 * [1], 9 * [-1], [1, -1, *7 * [1]]], ids=["infinity", "-infinity", "NaN"])
def test_logits_that_overflow_decide_nothing(signs):
    case = CASE._replace(feats=1e120 * (1 + FEATS**2), kernel=1e200 * np.outer(signs, np.ones(4)))
    assert np.isnan(measure(case).nc4)
    assert not np.isnan(measure(case).cdnv)
