"""A unit is near what is measured in it, and rounds nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.core.units import root_of_squares, unit_near


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_unit_is_a_power_of_2_near_the_size_from_the_smallest_to_the_largest_number(dtype):
    limits = np.finfo(dtype)
    sizes = jnp.asarray(np.geomspace(limits.tiny, limits.max / 16, 400), dtype)
    for function in (unit_near, jax.jit(unit_near), jax.vmap(unit_near)):
        units = np.asarray(function(sizes))
        assert units.dtype == dtype
        assert np.all(np.frexp(units)[0] == 0.5)
        assert np.all((sizes / units >= 0.74) & (sizes / units <= 1.51))
    huge = jnp.array([limits.max, np.inf], dtype)
    np.testing.assert_array_equal(unit_near(huge), unit_near(jnp.array([limits.max / 16] * 2, dtype)))
    np.testing.assert_array_equal(unit_near(jnp.array([0, np.nan], dtype)), 1)


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1.0, 1e20, 1e37])
def test_a_root_of_squares_is_that_in_float64(size):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)) * size, jnp.float32)
    want = np.sqrt(np.sum(np.asarray(values, float) ** 2, axis=0))
    np.testing.assert_allclose(root_of_squares(values), want, rtol=1e-6)
    assert root_of_squares(jnp.zeros((2, 1), jnp.float32))[0] == 0
    assert np.isnan(root_of_squares(jnp.array([[jnp.nan], [1.0]], jnp.float32))[0])
