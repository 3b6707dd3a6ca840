"""Feature robustness against its definition in float64, and its limit, relative flatness."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax import feature_robustness, relative_flatness

LOSSES = ("softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error")


def problem(num_features=5, num_outputs=4, num_samples=7, seed=0):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(num_features, num_outputs)), "bias": rng.normal(size=num_outputs)}
    feats, targets = rng.normal(size=(num_samples, num_features)), rng.random((num_samples, num_outputs))
    return jax.tree.map(jnp.asarray, (params, feats, targets / targets.sum(axis=1, keepdims=True)))


def plain(loss):
    """The losses as their definitions have them."""
    return {
        "softmax_cross_entropy": lambda z, y: -jnp.sum(y * jax.nn.log_softmax(z)),
        "sigmoid_cross_entropy": lambda z, y: -jnp.sum(y * jax.nn.log_sigmoid(z) + (1 - y) * jax.nn.log_sigmoid(-z)),
        "squared_error": lambda z, y: jnp.sum((z - y) ** 2) / 2,
    }[loss]


@pytest.mark.parametrize("delta", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize("distribution", ["orthogonal", "normal"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_named_loss_rises_as_its_definition_does(loss, distribution, delta):
    options = {"delta": delta, "key": jax.random.key(0), "distribution": distribution, "num_samples": 8}
    weights = jnp.asarray([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 3.0])
    named = feature_robustness(*problem(), **options, loss=loss, weights=weights)
    defined = feature_robustness(*problem(), **options, loss=plain(loss), weights=weights)
    np.testing.assert_allclose(named.value, defined.value, rtol=1e-9)
    np.testing.assert_allclose(named.standard_error, defined.standard_error, rtol=1e-9)


def test_a_draw_is_the_rise_of_the_loss_under_perturbed_features():
    params, feats, targets = jax.tree.map(np.asarray, problem())
    delta, key = 0.3, jax.random.key(1)
    rises = []
    for draw in jax.random.split(key, 3):
        matrix = np.asarray(jax.random.orthogonal(draw, 5, dtype=jnp.float64))
        for sign in (1, -1):
            losses = []
            for size in (sign * delta, 0):
                logits = (feats + size * feats @ matrix.T) @ params["kernel"] + params["bias"]
                p = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
                losses.append(-np.mean(np.sum(targets * np.log(p), axis=1)))
            rises.append(losses[0] - losses[1])
    estimate = feature_robustness(params, feats, targets, delta=delta, key=key, num_samples=3)
    np.testing.assert_allclose(estimate.value, np.mean(rises), rtol=1e-10)
    pairs = np.mean(np.reshape(rises, (3, 2)), axis=1)
    np.testing.assert_allclose(estimate.standard_error, np.std(pairs, ddof=1) / 3**0.5, rtol=1e-10)
    assert estimate.num_probes == 3


@pytest.mark.parametrize(("distribution", "scale"), [("orthogonal", 10.0), ("normal", 2.0)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_for_small_changes_it_is_relative_flatness_within_the_standard_error(loss, distribution, scale, dtype):
    arguments = jax.tree.map(lambda x: x.astype(dtype), problem())
    kappa = relative_flatness(*arguments, loss=loss)
    for delta in (1e-4, 1e-3, 1e-2):
        options = {"distribution": distribution, "num_samples": 4000, "loss": loss}
        value, error, _ = feature_robustness(*arguments, delta=delta, key=jax.random.key(2), **options)
        assert abs(scale * value / delta**2 - kappa) < 4 * scale * error / delta**2
        assert scale * error / delta**2 < 0.05 * kappa


@pytest.mark.parametrize("loss", LOSSES)
def test_it_keeps_its_digits_in_float32_where_the_changes_are_tiny(loss):
    low = jax.tree.map(lambda x: x.astype(jnp.float32), problem())
    large, tiny = (
        feature_robustness(*low, delta=delta, key=jax.random.key(0), num_samples=8, loss=loss).value / delta**2
        for delta in (1e-2, 1e-9)
    )
    assert tiny.dtype == jnp.float32
    np.testing.assert_allclose(tiny, large, rtol=1e-3)


@pytest.mark.parametrize("gap", [15.0, 30.0, 50.0])
def test_confident_samples_keep_their_digits_under_large_changes(gap):
    """In float32 against longer sums, where the plain difference of losses is 0."""
    params = {"kernel": jnp.asarray([[gap, 0.0, 1.0]], jnp.float32)}
    feats, labels = jnp.ones((1, 1), jnp.float32), jnp.asarray([0])
    delta = 4 / gap
    robustness = helpers.jit_as_usual(functools.partial(feature_robustness, num_samples=2))
    estimate = robustness(params, feats, labels, delta=delta, key=jax.random.key(0))
    logits = np.asarray([0.0, -gap, 1 - gap], np.longdouble)  # A is 1 or −1
    changes = np.float32(delta) * np.asarray([0.0, -gap, 1 - gap], np.longdouble)
    p = np.exp(logits) / np.sum(np.exp(logits))
    exact = sum(np.log1p(np.sum(p * np.expm1(sign * changes))) for sign in (1, -1)) / 2
    np.testing.assert_allclose(float(estimate.value), float(exact), rtol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_its_gradient_is_finite_where_features_are_zero(loss):
    params, feats, targets = problem()

    def rise(params, feats):
        return feature_robustness(
            params, feats, targets, delta=0.1, key=jax.random.key(0), num_samples=2, loss=loss
        ).value

    gradients = jax.grad(rise, argnums=(0, 1))(params, feats.at[0].set(0))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


def test_padding_counts_nowhere_and_bad_values_give_nan():
    params, feats, _ = problem()
    labels = jnp.asarray([0, 1, 2, 3, 0, 1, -100])
    options = {"delta": 0.1, "key": jax.random.key(0), "num_samples": 4}
    whole = feature_robustness(params, feats, labels, **options)
    part = feature_robustness(params, feats[:6], labels[:6], **options)
    np.testing.assert_allclose(whole.value, part.value, rtol=1e-12)
    assert np.isnan(feature_robustness(params, feats, labels.at[0].set(4), **options).value)
    assert np.isnan(feature_robustness(params, feats.at[0, 0].set(jnp.nan), labels, **options).value)


def test_it_is_exported_for_accelerators():
    arguments = jax.tree.map(lambda x: x.astype(jnp.float32), problem())

    def measure(params, feats, targets, key):
        return feature_robustness(params, feats, targets, delta=0.1, key=key)

    key = jax.random.key(0)
    exported = jax.export.export(jax.jit(measure), platforms=("cpu", "cuda", "tpu"))(*arguments, key)
    np.testing.assert_allclose(exported.call(*arguments, key).value, measure(*arguments, key).value, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "uniform"}, "distribution is 'uniform', wanted 'orthogonal' or 'normal'"),
        ({"num_samples": 1}, "num_samples is 1, wanted at least 2"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        feature_robustness(*problem(), delta=0.1, key=jax.random.key(0), **options)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"delta has shape \(4,\), wanted one number", {"delta": jnp.full(4, 0.1)}),
        (ValueError, r"delta has shape \(5, 1\), wanted one number", {"delta": jnp.full((5, 1), 0.1)}),
        (TypeError, "delta is None, wanted a real number", {"delta": None}),
        (TypeError, r"key is .*, wanted one key: jax\.random\.key", {"key": 0}),
    ],
)
def test_one_size_and_one_key_are_taken_at_a_time(error, message, options):
    with helpers.raises(error, message):
        feature_robustness(*problem(), **({"delta": 0.1, "key": jax.random.key(0)} | options))
