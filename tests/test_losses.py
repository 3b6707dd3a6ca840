"""Cross-entropy against its plain form in float64, where it is large, and against closed forms where it is tiny."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flatjax import cross_entropy, layer_relative_flatness, relative_flatness


def test_it_is_cross_entropy_with_its_derivatives():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)))
    labels = jnp.asarray([[0, 1, 2], [3, 4, 0]])

    def summed(loss):
        return lambda logits: jnp.sum(jnp.sin(jnp.arange(6.0).reshape(2, 3)) * loss(logits, labels))

    ours, plain = summed(cross_entropy), summed(optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_allclose(cross_entropy(logits, labels).shape, (2, 3))
    for each in (lambda f: f, jax.grad, jax.hessian):
        np.testing.assert_allclose(each(ours)(logits), each(plain)(logits), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("label", [3, -1, -100])
def test_a_bad_label_is_nan_in_every_derivative_and_other_samples_are_untouched(label):
    logits, labels = jnp.asarray([[1.0, 2.0, 0.5], [0.3, -1.0, 0.2]]), jnp.asarray([label, 1])
    good = cross_entropy(logits[1:], labels[1:])
    np.testing.assert_array_equal(cross_entropy(logits, labels)[1:], good)
    gradient = jax.jacobian(cross_entropy)(logits, labels)
    assert np.all(np.isnan(gradient[0, 0]))
    np.testing.assert_array_equal(gradient[1, 1], jax.grad(lambda z: cross_entropy(z, labels[1]))(logits[1]))
    hessian = jax.hessian(lambda z: cross_entropy(z, labels[0]))(logits[0])
    assert np.all(np.isnan(hessian))


def test_infinite_logits_leave_their_class_out_and_a_bad_label_is_nan():
    logits = jnp.asarray([[1.0, -jnp.inf, 0.5], [1.0, 2.0, 0.5]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 3])), [np.log1p(np.exp(-0.5)), np.nan], rtol=1e-12)


@pytest.mark.parametrize("scale", [32, 64, 128])
def test_in_float32_kappa_of_a_tiny_loss_is_that_of_the_closed_form(scale):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(16, 7))
    labels = rng.integers(0, 7, 64)
    feats = scale * (kernel.T[labels] + 0.1 * rng.normal(size=(64, 16))) / 4
    params, feats, labels = {"kernel": jnp.asarray(kernel, jnp.float32)}, jnp.asarray(feats, jnp.float32), labels
    closed = relative_flatness(params, feats, labels)

    def loss(params, feats, labels):
        return cross_entropy(feats @ params["kernel"], labels).mean()

    for method in ("outputs", "weights"):
        value = layer_relative_flatness(loss, params, feats, jnp.asarray(labels), layer="kernel", method=method).value
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, closed, rtol=1e-4)
    assert closed < 1e-2
