"""Confidence penalty and label smoothing against sums in float64 that do not cancel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax import cross_entropy
from flatjax.training import confidence_penalty, label_smoothing

# Compiled as wholes: operation by operation takes several times as long.
penalty, smoothed = jax.jit(confidence_penalty), jax.jit(label_smoothing)


def log_probabilities(logits):
    """In float64, the likeliest from the sum of the others."""
    relative = np.float64(logits) - np.max(np.float64(logits), axis=-1, keepdims=True)
    is_largest = np.eye(relative.shape[-1], dtype=bool)[np.argmax(relative, axis=-1)]
    return relative - np.log1p(np.sum(np.where(is_largest, 0, np.exp(relative)), axis=-1, keepdims=True))


def negative_entropy(logits):
    """And its gradient p (log p + H), in which no log p and H are near each other but where p is uniform."""
    log_p = log_probabilities(logits)
    p = np.exp(log_p)
    value = np.sum(p * log_p, axis=-1)
    return value, p * (log_p - value[..., None])


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, logits, *args):
    return loss(logits, *args), jax.grad(lambda z: jnp.sum(loss(z, *args)))(logits)


def confident(scale, dtype, shape=(6, 5)):
    """Logits of which one is ahead by about `scale`."""
    logits = np.random.default_rng(0).normal(size=shape)
    logits[..., 2] += scale
    return jnp.asarray(logits, dtype)


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5)])
def test_the_penalty_is_the_negative_entropy_in_float64(shape):
    logits = confident(1, jnp.float64, shape)
    for got, want in zip(value_and_gradient(confidence_penalty, logits), negative_entropy(logits), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)


# From an entropy of 2e-3 to 6e-33.
@pytest.mark.parametrize("scale", [10, 20, 40, 80])
def test_the_penalty_and_its_gradient_keep_their_digits_as_confidence_grows(scale):
    logits = confident(scale, jnp.float32)
    got, want = value_and_gradient(confidence_penalty, logits), negative_entropy(logits)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=2e-6 * max(1, scale / 20), atol=0)


def test_the_penalty_of_equal_logits_is_the_least_and_has_no_gradient():
    value, gradient = value_and_gradient(confidence_penalty, jnp.full((1, 7), 3.0))
    np.testing.assert_allclose(value, [-np.log(7)], rtol=1e-14)
    np.testing.assert_allclose(gradient, np.zeros((1, 7)), atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_the_penalty_and_its_gradient_are_finite_at_any_finite_logits_and_leave_out_those_at_minus_infinity(dtype):
    most = float(jnp.finfo(dtype).max)
    logits = jnp.asarray(
        [[0, most, -most], [most, most, -most], [-most, -most, 0], [1, -np.inf, 1], [500, -500, 0]], dtype
    )
    value, gradient = value_and_gradient(confidence_penalty, logits)
    rtol = 1e-14 if dtype == jnp.float64 else 1e-6
    np.testing.assert_allclose(value, -np.log([1, 2, 1, 2, 1]), rtol=rtol, atol=1e-200)
    assert np.all(np.isfinite(gradient.astype(float)))
    np.testing.assert_allclose(gradient.astype(float), np.zeros((5, 3)), atol=rtol)
    with_a_class_left_out = penalty(jnp.asarray([1.0, -jnp.inf, 0.5]))
    np.testing.assert_allclose(with_a_class_left_out, negative_entropy([1.0, 0.5])[0], rtol=1e-14)
    # And with confidence: the digits are kept of those that are left.
    value, gradient = value_and_gradient(confidence_penalty, jnp.asarray([28.0, -jnp.inf, 0.5], jnp.float32))
    want_value, want_gradient = negative_entropy([28.0, 0.5])
    np.testing.assert_allclose(value, want_value, rtol=2e-6)
    np.testing.assert_allclose(gradient, [want_gradient[0], 0, want_gradient[1]], rtol=4e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_penalty_of_a_bad_logit_is_nan(bad):
    got = penalty(jnp.array([[1.0, bad, 0], [1, 0, 2], [bad, bad, bad]]))
    np.testing.assert_array_equal(np.isnan(got), [True, False, True])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5)])
def test_smoothed_cross_entropy_is_a_mixture_of_that_of_the_label_and_of_all_classes(smoothing, shape):
    logits = confident(1, jnp.float64, shape)
    labels = jnp.asarray(np.random.default_rng(1).integers(0, 5, shape[:-1]))
    log_p = log_probabilities(logits)
    of_label = np.take_along_axis(log_p, np.asarray(labels)[..., None], axis=-1)[..., 0]
    value, gradient = value_and_gradient(label_smoothing, logits, labels, smoothing)
    np.testing.assert_allclose(value, -(1 - smoothing) * of_label - smoothing * log_p.mean(axis=-1), rtol=1e-13)
    targets = (1 - smoothing) * np.eye(5)[np.asarray(labels)] + smoothing / 5
    np.testing.assert_allclose(gradient, np.exp(log_p) - targets, rtol=1e-12, atol=1e-14)


# From a loss of 1e-4 to 1e-26, with labels of the likeliest class and of others.
@pytest.mark.parametrize("scale", [10, 28, 60])
def test_without_smoothing_it_is_cross_entropy_to_the_last_digits(scale):
    logits, labels = confident(scale, jnp.float32), jnp.array([2, 2, 2, 2, 0, 1])
    got, want = (
        value_and_gradient(loss, logits, labels, *args)
        for loss, args in ((label_smoothing, (0.0,)), (cross_entropy, ()))
    )
    log_p = log_probabilities(logits)
    np.testing.assert_allclose(got[0], -log_p[np.arange(6), labels], rtol=1e-6, atol=0)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6 * max(1, scale / 20), atol=0)


@pytest.mark.parametrize("smoothing", [1e-3, 0.3])
def test_smoothed_cross_entropy_and_its_gradient_keep_their_digits_as_confidence_grows(smoothing):
    logits, labels = confident(30, jnp.float32), jnp.array([2, 2, 2, 2, 0, 1])
    log_p = log_probabilities(logits)
    targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
    value, gradient = value_and_gradient(label_smoothing, logits, labels, smoothing)
    np.testing.assert_allclose(value, -np.sum(targets * log_p, axis=-1), rtol=1e-6)
    np.testing.assert_allclose(gradient, np.exp(log_p) - targets, rtol=1e-6, atol=1e-7 * smoothing)


def test_a_class_at_minus_infinity_has_no_part_without_smoothing_and_with_it_makes_the_loss_infinite():
    logits = jnp.asarray([[2.0, -jnp.inf, 0.5], [28.0, 0.0, -jnp.inf], [-jnp.inf, 1.0, 0.0]])
    labels, alone = jnp.array([0, 0, 0]), jnp.array([[2.0, 0.5], [28.0, 0.0]])
    value, gradient = value_and_gradient(label_smoothing, logits, labels, 0.0)
    want_value, want_gradient = value_and_gradient(cross_entropy, alone, labels[:2])
    np.testing.assert_allclose(value, [*want_value, np.inf], rtol=1e-14)
    np.testing.assert_allclose(gradient[:2][jnp.isfinite(logits[:2])].reshape(2, 2), want_gradient, rtol=1e-14)
    np.testing.assert_array_equal(gradient[:2][jnp.isneginf(logits[:2])], [0, 0])
    np.testing.assert_array_equal(smoothed(logits, labels, 0.1), np.full(3, np.inf))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_smoothed_cross_entropy_of_a_bad_logit_is_nan(bad, smoothing):
    """Of the label, and of another class."""
    got = smoothed(jnp.array([[bad, 1.0, 0], [1, bad, 0], [1, 0, 2]]), jnp.array([0, 0, 0]), smoothing)
    np.testing.assert_array_equal(np.isnan(got), [True, True, False])


def test_the_loss_has_its_slope_in_the_smoothing_where_there_is_none():
    logits, labels = confident(1, jnp.float64), jnp.array([0, 1, 2, 3, 4, 0])
    got = jax.jit(jax.jacobian(label_smoothing, argnums=2))(logits, labels, jnp.zeros(()))
    log_p = log_probabilities(logits)
    np.testing.assert_allclose(got, log_p[np.arange(6), labels] - log_p.mean(axis=-1), rtol=1e-13)


def test_smoothing_may_be_traced_and_is_computed_in_float32_at_least():
    logits, labels = confident(1, jnp.bfloat16), jnp.array([0, 1, 2, 3, 4, 0])
    got = jax.jit(jax.vmap(label_smoothing, in_axes=(None, None, 0)))(logits, labels, jnp.array([0.0, 0.3]))
    assert got.dtype == jnp.float32
    log_p = log_probabilities(np.asarray(logits, float))
    for smoothing, losses in zip([0, 0.3], got, strict=True):
        want = -(1 - smoothing) * log_p[np.arange(6), labels] - smoothing * log_p.mean(axis=-1)
        np.testing.assert_allclose(losses, want, rtol=1e-6)


def test_a_label_or_smoothing_out_of_range_is_nan():
    logits = jnp.zeros((4, 3))
    got = smoothed(logits, jnp.array([2, 3, -1, -100]), 0.1)
    np.testing.assert_allclose(got, [np.log(3), np.nan, np.nan, 0], rtol=1e-14)
    for smoothing in (-0.1, 1.1, np.nan):
        assert np.all(np.isnan(smoothed(logits, jnp.array([0, 1, 2, 0]), smoothing)))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_samples_split_among_devices_stay_there(axis_type):
    logits, labels = confident(1, jnp.float64, (8, 5)), jnp.arange(8) % 5
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(axis_type,)), PartitionSpec("data"))
    for loss, args in ((penalty, (logits,)), (smoothed, (logits, labels, 0.1))):
        got = loss(*jax.device_put(args[:2], sharding), *args[2:])
        assert got.sharding.is_equivalent_to(sharding, 1)
        np.testing.assert_allclose(got, loss(*args), rtol=1e-14)


@pytest.mark.parametrize(("label", "smoothing"), [(9, 0.0), (9, 0.1), (1, 1.5)])
def test_what_is_no_label_and_no_smoothing_is_nan_in_its_gradient_too(label, smoothing):
    gradient = value_and_gradient(label_smoothing, jnp.array([1.0, 2.0, 0.5]), jnp.array(label), smoothing)[1]
    assert np.all(np.isnan(gradient))
