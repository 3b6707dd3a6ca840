"""Norms at any size, and signs that are independent of each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.curvature.vectors import norm, random_signs


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 1e38])
def test_no_square_of_a_norm_overflows_or_underflows(size):
    x = {"a": jnp.asarray([3, 0], jnp.float32) * (size / 5), "b": jnp.asarray([[4]], jnp.float32) * (size / 5)}
    np.testing.assert_allclose(norm(x), size, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (31,), (32,), (33,), (7, 5), (3, 3, 16, 8)])
def test_signs_have_mean_0_and_no_correlation(shape):
    num_draws = 4000
    keys = jax.random.split(jax.random.key(0), num_draws)
    draws = jax.jit(jax.vmap(lambda key: random_signs(key, shape, jnp.float32)))(keys)
    signs = np.asarray(draws).reshape(num_draws, -1)
    assert set(np.unique(signs)) == {-1, 1}
    correlations = signs.T @ signs / num_draws - np.eye(signs.shape[1])
    assert np.max(np.abs(np.mean(signs, axis=0))) < 6 / num_draws**0.5
    assert np.max(np.abs(correlations)) < 6 / num_draws**0.5
    assert np.sqrt(np.mean(correlations**2)) < 1.1 / num_draws**0.5


def test_signs_of_every_axis_and_place_are_drawn_anew():
    signs = np.asarray(random_signs(jax.random.key(1), (257, 129), jnp.float64))
    for axis in (0, 1):
        for shift in (1, 2, 31, 32, 33, 64):
            overlap = np.mean(signs * np.roll(signs, shift, axis=axis))
            assert abs(overlap) < 5 / signs.size**0.5
