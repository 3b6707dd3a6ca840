"""What the metrics refuse, and that a bad value never comes out as a plausible number."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import flatjax

PROBLEM = helpers.random_problem(3, 5, (9,))._replace(weights=np.ones(9))
TARGETS = helpers.random_problem(3, 5, (9,), "distribution").labels


def kappa(labels=PROBLEM.labels, loss="softmax_cross_entropy", problem=PROBLEM):
    return flatjax.relative_flatness(problem.params, problem.feats, labels, loss=loss)


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (
            ValueError,
            r"loss is 'cross_entropy', wanted 'softmax_cross_entropy', .* or a callable",
            {"loss": "cross_entropy"},
        ),
        (TypeError, "loss is a NoneType, wanted a name or a callable", {"loss": None}),
        (TypeError, "labels has dtype float64 and one entry a sample, wanted integer classes", {"labels": np.ones(9)}),
        (TypeError, "labels has dtype bool and one entry a sample", {"labels": np.ones(9, bool)}),
        (ValueError, "labels has 4 targets a sample, but the head has 3 outputs", {"labels": np.ones((9, 4))}),
        (ValueError, "labels has 0 targets a sample, but the head has 3 outputs", {"labels": np.ones((9, 0))}),
        (
            ValueError,
            r"labels has shape \(9,\), which names one of 1 classes; wanted the binary targets .* labels\[..., None\]",
            {
                "loss": "sigmoid_cross_entropy",
                "labels": np.zeros(9, int),
                "problem": helpers.random_problem(1, 5, (9,)),
            },
        ),
    ],
)
def test_what_is_no_loss_or_not_its_labels_is_refused(error, match, arguments):
    with helpers.raises(error, match):
        kappa(**arguments)


@pytest.mark.parametrize("loss", ["squared_error", "sigmoid_cross_entropy"])
@pytest.mark.parametrize("labels", [np.ones(9), np.ones((9, 4))])
def test_every_named_loss_checks_its_labels(loss, labels):
    with helpers.raises((TypeError, ValueError), "wanted integer classes"):
        kappa(labels, loss)


def spoilt(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


NAMED_AND_CALLABLE = [*helpers.NAMED, helpers.focal]
BAD_VALUES = [
    *(
        pytest.param(
            loss,
            PROBLEM._replace(**{name: spoilt(getattr(PROBLEM, name), 4, value)}),
            id=f"{helpers.name_of(loss)}-{name}-{value}",
        )
        for loss in NAMED_AND_CALLABLE
        for name, value in [
            ("feats", np.nan),
            ("feats", np.inf),
            ("feats", 1e200),
            ("weights", -0.1),
            ("weights", np.nan),
        ]
    ),
    *(
        pytest.param(loss, PROBLEM._replace(labels=spoilt(PROBLEM.labels, 4, label)), id=f"{loss}-label-{label}")
        for loss in helpers.NAMED
        for label in (-1, 3)
    ),
    *(
        pytest.param(loss, PROBLEM._replace(labels=spoilt(TARGETS, (4, 1), value)), id=f"{loss}-target-{value}")
        for loss in helpers.NAMED
        for value in (np.nan, np.inf)
    ),
    pytest.param(
        "softmax_cross_entropy", PROBLEM._replace(labels=spoilt(TARGETS, (4, 1), -0.1)), id="negative probability"
    ),
    *(
        pytest.param(loss, PROBLEM._replace(weights=np.zeros(9)), id=f"{helpers.name_of(loss)}-no weight at all")
        for loss in NAMED_AND_CALLABLE
    ),
]


@pytest.mark.parametrize(("loss", "problem"), BAD_VALUES)
def test_a_bad_value_is_nan_in_every_metric(loss, problem):
    got = helpers.measure(problem, loss)
    assert np.isnan(got.kappa)
    assert np.isnan(got.simplified)
    assert np.isnan(got.maximal)
    # A loss that is a sum over the outputs has traces on the diagonal alone, whatever its values.
    assert np.all(np.isnan(np.diag(got.traces)))


@pytest.mark.parametrize("loss", NAMED_AND_CALLABLE)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_diverged_head_has_no_flatness(loss, name):
    got = helpers.measure(PROBLEM._replace(**{name: spoilt(getattr(PROBLEM, name), 1, np.nan)}), loss)
    assert np.isnan(got.kappa)
    assert np.isnan(got.simplified)
    assert np.isnan(got.maximal)
    # The other outputs may have traces of their own.
    assert np.isnan(got.traces[1, 1])


def test_one_good_sample_among_padding_is_enough():
    alone = PROBLEM._replace(weights=np.eye(9)[4])
    want = PROBLEM._replace(feats=PROBLEM.feats[4], labels=PROBLEM.labels[4], weights=np.ones(()))
    helpers.assert_same_flatness(helpers.measure(alone), helpers.measure(want), rtol=1e-14)


CHECKED = [
    (PROBLEM._replace(labels=spoilt(PROBLEM.labels, 4, 17)), r"labels\[4\] is 17; wanted 0 <= label < 3"),
    (PROBLEM._replace(labels=spoilt(PROBLEM.labels, 2, -1)), r"labels\[2\] is -1; wanted 0 <= label < 3"),
    (PROBLEM._replace(labels=spoilt(TARGETS, (4, 1), np.nan)), r"labels\[4\] has a target that is not finite"),
    (PROBLEM._replace(labels=spoilt(TARGETS, (4, 1), -0.1)), r"labels\[4\] has a negative probability"),
    (PROBLEM._replace(feats=spoilt(PROBLEM.feats, (7, 2), np.inf)), r"feats\[7\] holds a NaN"),
    (PROBLEM._replace(weights=spoilt(PROBLEM.weights, 3, -2)), r"weights\[3\] is -2.0; wanted 0 or more, and"),
]


@jax.jit
@checkify.checkify
def check(problem):
    flatjax.check_inputs(problem.params, problem.feats, problem.labels, weights=problem.weights)


@pytest.mark.parametrize(("problem", "message"), CHECKED)
def test_a_check_says_which_sample_is_bad(problem, message):
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        check(problem)[0].throw()
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        flatjax.check_inputs(problem.params, problem.feats, problem.labels, weights=problem.weights)


def test_a_check_does_not_name_padding():
    problem = PROBLEM._replace(labels=spoilt(PROBLEM.labels, 1, 17), weights=spoilt(PROBLEM.weights, 0, 0))
    with pytest.raises(checkify.JaxRuntimeError, match=r"labels\[1\] is 17"):
        check(problem)[0].throw()


def test_a_check_lets_padding_pass():
    problem = PROBLEM._replace(
        labels=spoilt(PROBLEM.labels, 4, -1),
        feats=spoilt(PROBLEM.feats, 4, np.nan),
        weights=spoilt(PROBLEM.weights, 4, 0),
    )
    check(problem)[0].throw()
    assert np.isfinite(helpers.measure(problem).kappa)


def test_a_check_counts_samples_in_row_major_order():
    problem = helpers.random_problem(3, 5, (2, 3, 4))
    labels = spoilt(problem.labels, (1, 1, 1), 9)
    with pytest.raises(checkify.JaxRuntimeError, match=r"labels\[17\] is 9"):
        check(problem._replace(labels=labels))[0].throw()


def with_bias(bias):
    return PROBLEM._replace(bias=np.array(bias))


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "sigmoid_cross_entropy"])
def test_a_check_takes_an_output_left_out_as_the_metrics_do(loss):
    problem = with_bias([0.3, 0.1, -np.inf])
    flatjax.check_inputs(problem.params, problem.feats, problem.labels, loss=loss)
    assert np.all(np.isfinite(np.asarray(helpers.measure(problem, loss)[:3])))


@pytest.mark.parametrize(
    ("bias", "loss", "message"),
    [
        ([0.3, 0.1, np.inf], "softmax_cross_entropy", "the bias of the head holds a NaN or an infinity"),
        ([0.3, np.nan, -np.inf], "softmax_cross_entropy", "the bias of the head holds a NaN or an infinity"),
        ([0.3, np.inf, 0], "sigmoid_cross_entropy", "the bias of the head holds a NaN or an infinity"),
        ([-np.inf] * 3, "softmax_cross_entropy", "all biases of the head are -inf"),
        ([0.3, 0.1, -np.inf], "squared_error", "the bias of the head holds a NaN or an infinity"),
    ],
)
def test_a_check_names_a_bias_that_makes_the_metrics_nan(bias, loss, message):
    problem = with_bias(bias)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        flatjax.check_inputs(problem.params, problem.feats, problem.labels, loss=loss)
    assert np.isnan(helpers.measure(problem, loss).kappa)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_check_names_a_weight_that_is_not_finite(value):
    problem = PROBLEM._replace(weight=spoilt(PROBLEM.weight, (1, 2), value))
    with pytest.raises(checkify.JaxRuntimeError, match="the weight of the head holds a NaN or an infinity"):
        flatjax.check_inputs(problem.params, problem.feats, problem.labels)
    assert np.isnan(helpers.measure(problem).kappa)


def test_a_metric_has_no_effect_that_would_slow_its_call():
    jaxpr = jax.make_jaxpr(flatjax.relative_flatness)(PROBLEM.params, PROBLEM.feats, PROBLEM.labels)
    assert not jaxpr.effects


@pytest.mark.parametrize("shape", [(1,), (3,)])
def test_a_loss_that_is_no_scalar_is_refused(shape):
    with helpers.raises(ValueError, rf"loss returns the shape \({shape[0]},\)"):
        flatjax.relative_flatness(
            PROBLEM.params, PROBLEM.feats, PROBLEM.labels, loss=lambda z, y: jnp.broadcast_to(jnp.sum(z**2), shape)
        )
