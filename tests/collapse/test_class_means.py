"""Means, spreads and shares of the classes; which samples and classes count, and that nothing else does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.collapse.class_means import class_means

from .cases import (
    COUNTS,
    FEW_CLASSES,
    MANY_CLASSES,
    METRICS,
    assert_close,
    expected,
    gradients,
    measure,
    moments_of,
    random_case,
)

MASKED = (6, 0, 5, 1, 7, 6, 1), 9  # of which `FEW_CLASSES` remain
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


@functools.partial(jax.jit, static_argnums=3)
def means_of(feats, labels, weights, num_classes):
    """The kept classes, the centred means and the variances, and the residuals of the samples."""
    moments = moments_of(feats, labels, weights, num_classes)
    classes = class_means(moments)
    residuals = moments.residuals(moments.read(feats, labels, weights))
    return classes.kept, classes.centred, classes.variances, residuals


@pytest.mark.parametrize("offset", [0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_residuals_of_a_class_and_centred_means_sum_to_zero(dtype, offset):
    case = random_case(*MASKED)
    feats = (case.feats + offset).astype(dtype)
    kept, centred, _, residuals = means_of(feats, case.labels, np.full(26, 1 / 26, dtype), 7)
    eps = np.finfo(dtype).eps
    # To rounding of the spread and of the distances, which are of order 1, whatever the offset: NC1 inverts the centred
    # means, and takes what is left of their sum for a direction in which they differ.
    assert np.max(np.abs(np.sum(centred, axis=0))) < 8 * eps
    for label in np.flatnonzero(kept):
        assert np.max(np.abs(np.sum(residuals[case.labels == label], axis=0))) < 16 * eps


def test_only_classes_of_two_samples_are_kept_and_others_hold_zeros():
    case = random_case(*MASKED)
    kept, centred, variances, _ = means_of(case.feats, case.labels, case.weights, 7)
    out = np.array(MASKED[0]) < 2
    assert kept.tolist() == (~out).tolist()
    assert not np.any(centred[out])
    assert not np.any(variances[out])


def test_classes_without_two_samples_change_nothing_but_the_choices_of_the_network():
    case = random_case(*MASKED)
    kept = np.flatnonzero(np.array(MASKED[0]) >= 2)
    rows = np.isin(case.labels, kept)
    alone = case._replace(
        kernel=case.kernel[:, kept],
        bias=case.bias[kept],
        feats=case.feats[rows],
        labels=np.searchsorted(kept, case.labels[rows]),
        weights=case.weights[rows],
    )
    assert_close(measure(case), measure(alone), **ROUNDING, names=set(METRICS) - {"nc4"})
    assert [int(getattr(measure(case), name)) for name in COUNTS] == [4, 1, 2]
    assert [int(getattr(measure(alone), name)) for name in COUNTS] == [4, 0, 0]
    # The network still chooses among all its outputs, also one that is no nearest mean: here it does.
    assert_close(measure(case), expected(case), **ROUNDING, names=["nc4"])
    assert measure(case).nc4 > measure(alone).nc4 + 0.01


def test_a_network_that_always_chooses_an_empty_class_never_agrees_with_the_means():
    case = random_case(*MASKED)
    assert float(measure(case._replace(bias=1e3 * (np.arange(7) == 1))).nc4) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("size", [1.0, 1e18], ids=str)
def test_the_sample_of_a_single_class_counts_nowhere_whatever_its_size(size):
    case = random_case((9, 0, 8, 1, 11, 1), 4).astype("float32")
    single = np.isin(case.labels, [3, 5])[:, None]
    case = case._replace(feats=case.feats * np.float32(1e-3))
    outlier = case._replace(feats=np.where(single, np.float32(size), case.feats))
    assert_close(measure(outlier), measure(case), rtol=0, atol=0, names=set(METRICS) - {"nc4"})


@pytest.mark.parametrize("counts", [(24, 0, 0, 0), (22, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("num_weights", [24, 1])
def test_fewer_than_two_classes_with_two_samples_have_no_collapse(counts, num_weights):
    case = random_case(counts, 9)
    case.weights[num_weights:] = 0
    weighing = np.bincount(case.labels[:num_weights], minlength=4).tolist()
    actual = measure(case)
    assert [name for name in METRICS if not np.isnan(getattr(actual, name))] == []
    assert [int(getattr(actual, name)) for name in COUNTS] == [
        sum(count >= 2 for count in weighing),
        weighing.count(0),
        weighing.count(1),
    ]


def test_what_samples_of_weight_zero_hold_changes_neither_value_nor_gradient():
    case = random_case((8, 7, 2, 7), 9)
    void = np.random.default_rng(4).random(24) < 0.3
    # Of the two samples of class 2 one is void: the other is a single class.
    void[case.labels == 2] = [True, False]
    case = case._replace(weights=np.where(void, 0, case.weights))
    garbage = case._replace(
        feats=np.where(void[:, None], [np.nan, np.inf, -np.inf, 1e300, 0, 1, -1, 2, 3], case.feats),
        labels=np.where(void, np.where(case.labels % 2, -7, 99), case.labels),
    )
    assert [int(getattr(measure(garbage), name)) for name in COUNTS] == [3, 0, 1]
    # `case` is as if these samples were not there: its fields are the oracle's, which skips them.
    assert_close(measure(case), expected(case), **ROUNDING)
    assert_close(measure(garbage), measure(case), **ROUNDING)
    for name, wanted in gradients(case).items():
        actual = gradients(garbage)[name]
        for of_garbage, of_case in zip(actual, wanted, strict=True):
            np.testing.assert_allclose(of_garbage, of_case, **ROUNDING, err_msg=name)
        assert not np.any(actual[2][void]), name


def test_only_the_ratios_of_the_weights_matter():
    case = random_case(*FEW_CLASSES)
    assert_close(measure(case._replace(weights=1e6 * case.weights)), measure(case), **ROUNDING)


def test_integer_weights_repeat_samples():
    case = random_case(*MANY_CLASSES)
    # No, one and two times, in turn through each class: 30 samples in all, and of each class two or more before.
    weights = np.argsort(np.argsort(case.labels)) % 3
    repeated = case._replace(
        feats=np.repeat(case.feats, weights, axis=0), labels=np.repeat(case.labels, weights), weights=np.ones(30)
    )
    assert_close(measure(case._replace(weights=weights)), expected(repeated), **ROUNDING)


def test_boolean_weights_select_samples():
    case = random_case(*MANY_CLASSES)
    chosen = np.random.default_rng(6).random(30) < 0.8
    assert_close(measure(case._replace(weights=chosen)), expected(case._replace(weights=chosen)), **ROUNDING)


def test_no_weight_at_all_is_no_collapse():
    actual = measure(random_case(*FEW_CLASSES)._replace(weights=np.zeros(24)))
    assert [name for name in METRICS if not jnp.isnan(getattr(actual, name))] == []
