"""Spectral densities are those of dense spectra, smeared out alike, to their standard error."""

import functools

import helpers
import jax
import numpy as np
import pytest

from flatjax.curvature.density import spectral_density
from flatjax.curvature.products import Hessian
from flatjax.curvature.streams import Streamed

from . import cases

KEY = jax.random.key(0)


def smeared(eigenvalues, grid, width):
    heights = np.exp(-(((np.asarray(grid)[:, None] - eigenvalues) / width) ** 2) / 2)
    return np.mean(heights, axis=1) / (width * np.sqrt(2 * np.pi))


SPECTRUM = np.concatenate([np.linspace(-0.5, 0.3, 60), 1 + 0.2 * np.linspace(-1, 1, 38) ** 3, [2.0, 2.5]])


@functools.cache
def estimate_of_spectrum(dtype="float64"):
    matrix, _ = cases.matrix_with(SPECTRUM, dtype=np.dtype(dtype))
    return spectral_density(cases.matrix_curvature(matrix), KEY, num_probes=20, num_steps=60, broadening=0.1)


def test_a_density_is_that_of_the_dense_spectrum_to_its_standard_error():
    estimate = estimate_of_spectrum()
    want = smeared(SPECTRUM, estimate.grid, 0.1)
    errors = np.asarray(estimate.density) - want
    # Where there is little density, it is of few probes that happen to have some.
    scores = (errors / np.asarray(estimate.standard_error))[want > 0.05]
    assert np.max(np.abs(scores)) < 4
    assert 0.4 < np.sqrt(np.mean(scores**2)) < 1.6
    assert np.max(np.abs(errors)) < 4 * np.max(estimate.standard_error)
    assert np.max(estimate.standard_error) < 0.2 * np.max(want)
    assert (estimate.broadening, estimate.num_probes) == (0.1, 20)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_density_integrates_to_1_and_its_mean_is_that_of_the_spectrum(dtype):
    estimate = estimate_of_spectrum(dtype)
    assert estimate.density.dtype == dtype
    grid, density = (np.asarray(x, float) for x in (estimate.grid, estimate.density))
    np.testing.assert_allclose(np.trapezoid(density, grid), 1, atol=1e-5)
    assert abs(np.trapezoid(density * grid, grid) - np.mean(SPECTRUM)) < 0.1
    assert np.all(density >= 0)


@pytest.mark.parametrize("matrix", [np.diag([2.0, 2.0, 2.0]), np.zeros((3, 3)), np.array([[-7.0]]), 1e-20 * np.eye(3)])
def test_a_spectrum_of_one_point_is_one_gaussian(matrix):
    estimate = spectral_density(cases.matrix_curvature(matrix), KEY, num_probes=2, num_steps=8)
    np.testing.assert_allclose(np.trapezoid(estimate.density, estimate.grid), 1, atol=1e-5)
    want = smeared(np.diag(matrix), estimate.grid, float(estimate.broadening))
    np.testing.assert_allclose(estimate.density, want, rtol=1e-6, atol=1e-6 * np.max(want))
    assert np.max(estimate.standard_error) < 1e-6 * np.max(want)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_a_float32_density_of_any_size_has_the_errors_of_one_of_size_1(size):
    matrix, _ = cases.matrix_with(np.linspace(-1, 3, 12), dtype=np.float32)
    got, want = (
        spectral_density(cases.matrix_curvature(matrix * np.float32(scale)), KEY, num_probes=3, num_steps=6)
        for scale in (size, 1)
    )
    np.testing.assert_allclose(np.asarray(got.grid, float) / size, want.grid, rtol=1e-3, atol=1e-3)
    for name in ("density", "standard_error"):
        value, wanted = (np.asarray(getattr(x, name), float) for x in (got, want))
        np.testing.assert_allclose(value * size, wanted, rtol=0.02, atol=1e-3 * np.max(wanted))


def test_the_broadening_is_a_hundredth_of_the_spectrum_by_default():
    matrix, _ = cases.matrix_with([-1.0, 0.5, 3.0])
    estimate = spectral_density(cases.matrix_curvature(matrix), KEY, num_probes=2, num_steps=8)
    np.testing.assert_allclose(estimate.broadening, 0.04, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(estimate.grid)[[0, -1]], [-1.24, 3.24], rtol=1e-6)
    np.testing.assert_allclose(np.trapezoid(estimate.density, estimate.grid), 1, atol=1e-5)


def test_a_network_in_batches_has_the_density_of_the_whole_inside_jit_or_not():
    x, y = cases.samples()
    params, leaves, options = cases.mlp_params(), ("hidden/kernel",), {"num_probes": 2, "num_steps": 6}
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    in_batches = Streamed(lambda x, y: Hessian(cases.loss_fn, params, (x, y), leaves), batches)
    whole = cases.mlp_hessian(leaves=leaves)
    want = spectral_density(whole, KEY, **options)
    compiled = jax.jit(lambda curvature: spectral_density(curvature, KEY, **options))(whole)
    for got in (spectral_density(in_batches, KEY, **options), compiled):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-8), got, want)


def test_what_is_not_finite_or_not_resolved_has_no_density():
    matrix = np.diag([1.0, np.nan, 3.0])
    assert np.all(np.isnan(spectral_density(cases.matrix_curvature(matrix), KEY, num_probes=2, num_steps=3).density))
    curvature = cases.matrix_curvature(np.diag([1.0, 2.0, 3.0]))
    options = {"num_probes": 2, "num_steps": 3, "num_points": 50}
    assert np.all(np.isnan(spectral_density(curvature, KEY, broadening=0.01, **options).density))
    assert np.all(np.isfinite(spectral_density(curvature, KEY, broadening=0.1, **options).density))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_probes": 1}, "num_probes is 1"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_points": 1}, "num_points is 1"),
        ({"broadening": -1.0}, "broadening is -1.0, wanted it above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(change, match):
    with helpers.raises(ValueError, match):
        spectral_density(cases.mlp_hessian(), KEY, **change)
