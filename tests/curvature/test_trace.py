"""Traces and diagonals are estimated without bias, and err by their standard error."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.curvature.estimate import exactly, mean_of
from flatjax.curvature.products import Hessian
from flatjax.curvature.streams import Streamed
from flatjax.curvature.traces import diagonal, trace

from . import cases

KEY = jax.random.key(0)
METHODS = ("hutchinson", "xtrace")
N = 30
"""The size of most matrices, so that estimators are compiled for one."""


def power_law(n, power):
    return np.arange(1.0, n + 1) ** -power


@functools.partial(jax.jit, static_argnames=("num_probes", "method"))
def traces(curvature, keys, num_probes, method):
    """Of many keys: inside jit, under vmap."""
    return jax.vmap(lambda key: trace(curvature, key, num_probes=num_probes, method=method))(keys)


# XTrace's samples share vectors: the standard error is known to be somewhat too small.
@pytest.mark.parametrize(("method", "lowest"), [("hutchinson", 0.8), ("xtrace", 0.5)])
def test_the_error_of_a_trace_is_its_standard_error(method, lowest):
    matrix, _ = cases.matrix_with(power_law(N, 0.5) * np.where(np.arange(N) % 3, 1, -0.5))
    estimates = traces(cases.matrix_curvature(matrix), jax.random.split(KEY, 400), 6, method)
    errors = estimates.value - np.trace(matrix)
    assert abs(np.mean(errors)) < 4 * np.std(errors) / 20
    assert lowest < np.mean(estimates.standard_error**2) / np.mean(errors**2) < 1.25
    assert np.all(estimates.num_probes == 6)


def test_the_variance_of_hutchinsons_probe_is_twice_the_squares_off_the_diagonal():
    matrix, _ = cases.matrix_with(power_law(N, 1))
    estimate = trace(cases.matrix_curvature(matrix), KEY, num_probes=4000, chunk_size=100)
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2))
    np.testing.assert_allclose(estimate.standard_error, np.sqrt(variance / 4000), rtol=0.06)


def test_the_trace_of_a_diagonal_matrix_is_exact_and_says_so():
    entries = np.random.default_rng(0).normal(size=N)
    estimate = trace(cases.matrix_curvature(np.diag(entries)), KEY, num_probes=4)
    np.testing.assert_allclose(estimate.value, np.sum(entries), rtol=1e-13)
    assert estimate.standard_error < 1e-14


def test_xtrace_is_exact_where_the_rank_is_below_the_number_of_probes():
    for dtype, rtol, num_probes in [(np.float64, 1e-12, 4), (np.float32, 1e-5, 20)]:
        matrix, _ = cases.matrix_with([3.0, -1.0, 0.5] + [0.0] * (N - 3), dtype=dtype)
        estimate = trace(cases.matrix_curvature(matrix), KEY, num_probes=num_probes, method="xtrace")
        assert estimate.value.dtype == dtype
        np.testing.assert_allclose(estimate.value, 2.5, rtol=rtol)
        assert estimate.standard_error < rtol


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_the_size_of_a_float32_curvature_does_not_matter_to_xtrace(size):
    matrix, _ = cases.matrix_with(power_law(N, 3))
    exact = size * np.trace(matrix)
    estimate = trace(cases.matrix_curvature((size * matrix).astype(np.float32)), KEY, num_probes=20, method="xtrace")
    assert abs(float(estimate.value) - exact) < 4 * float(estimate.standard_error) + 1e-5 * exact
    assert float(estimate.standard_error) < 1e-3 * exact


def test_xtrace_is_closer_than_hutchinson_at_the_same_number_of_products_where_the_spectrum_falls():
    matrix, _ = cases.matrix_with(power_law(N, 3))
    keys = jax.random.split(KEY, 400)
    errors = [
        np.sqrt(np.mean((traces(cases.matrix_curvature(matrix), keys, k, method).value - np.trace(matrix)) ** 2))
        for method, k in [("xtrace", 6), ("hutchinson", 12)]
    ]
    assert errors[0] < errors[1] / 10


@pytest.mark.parametrize("n", [1, 5, 8])
def test_xtrace_is_exact_for_a_matrix_no_larger_than_the_number_of_probes(n):
    matrix, _ = cases.matrix_with(power_law(n, 1))
    estimates = traces(cases.matrix_curvature(matrix), jax.random.split(KEY, 50), 8, "xtrace")
    assert np.all(estimates.num_probes == n)
    assert np.all(estimates.standard_error == 0)
    np.testing.assert_allclose(estimates.value, np.trace(matrix), rtol=1e-9)


def sum_of_cubes(params):
    return jnp.sum(jax.tree.leaves(params)[0].astype(float) ** 3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"relative_error": 0.01}, {"num_probes": 2, "chunk_size": 2}])
def test_one_parameter_has_the_second_derivative_as_its_trace_without_an_error(method, options):
    for params in (jnp.array(3.0), jnp.array([3.0]), {"w": jnp.array([[3.0]], jnp.bfloat16)}):
        estimate = trace(Hessian(sum_of_cubes, params), KEY, method=method, **options)
        np.testing.assert_allclose(estimate[:2], [18, 0], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_fewer_probes_than_two_are_named_as_they_were_given(method):
    with helpers.raises(ValueError, "num_probes is 1, wanted at least 2"):
        trace(Hessian(lambda w: w**2, jnp.array(3.0)), KEY, num_probes=1, method=method)


def test_xtrace_is_exact_for_a_multiple_of_the_identity():
    estimate = trace(cases.matrix_curvature(3 * np.eye(N)), KEY, num_probes=4, method="xtrace")
    np.testing.assert_allclose(estimate[:2], [90, 0], rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_of_zeros_has_the_trace_0(method):
    estimate = trace(cases.matrix_curvature(np.zeros((N, N))), KEY, num_probes=4, method=method)
    assert estimate.value == 0
    assert estimate.standard_error == 0


@pytest.mark.parametrize(("method", "relative_error"), [("hutchinson", 0.05), ("xtrace", 0.04)])
def test_probes_are_added_until_the_error_is_small_enough(method, relative_error):
    matrix, _ = cases.matrix_with(power_law(N, 1))
    curvature, options = cases.matrix_curvature(matrix), {"method": method, "chunk_size": 2}
    estimate = trace(curvature, KEY, num_probes=4, relative_error=relative_error, **options)
    assert estimate.num_probes > 4
    assert estimate.standard_error <= relative_error * estimate.value
    half = trace(curvature, KEY, num_probes=int(estimate.num_probes) // 2, **options)
    assert half.standard_error > relative_error * half.value
    same = trace(curvature, KEY, num_probes=int(estimate.num_probes), **options)
    np.testing.assert_allclose(same, estimate, rtol=1e-9)
    assert abs(estimate.value - np.trace(matrix)) < 4 * estimate.standard_error


def test_a_budget_of_probes_is_kept_and_the_error_not_hidden():
    estimate = trace(cases.mlp_hessian(), KEY, num_probes=3, relative_error=1e-6, max_probes=10)
    assert estimate.num_probes == 10
    assert estimate.standard_error > 1e-6 * abs(estimate.value)


def in_batches_and_whole(leaves=None):
    x, y = cases.samples()
    params, batches = cases.mlp_params(), [(x[:2], y[:2]), (x[2:], y[2:])]
    streamed = Streamed(lambda x, y: Hessian(cases.loss_fn, params, (x, y), leaves), batches)
    return streamed, cases.mlp_hessian(leaves=leaves)


@pytest.mark.parametrize(("method", "leaves"), [("hutchinson", None), ("xtrace", ("hidden/kernel",))])
def test_batches_have_the_trace_of_the_whole_with_the_same_probes(method, leaves):
    options = {"num_probes": 3, "relative_error": 1e-3, "max_probes": 6, "method": method}
    got, want = (trace(curvature, KEY, **options) for curvature in in_batches_and_whole(leaves))
    assert got.num_probes == 6
    np.testing.assert_allclose(got, want, rtol=1e-9)


# The diagonal.


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_the_errors_of_a_diagonal_are_its_standard_errors(chunk_size):
    curvature, matrix = cases.mlp_hessian(), cases.mlp_matrix()
    estimate = diagonal(curvature, KEY, num_probes=302, chunk_size=chunk_size)
    assert jax.tree.structure(estimate.value) == jax.tree.structure(curvature.like)
    value, error = (cases.ravelled(jax.tree.map(lambda leaf: leaf[None], tree))[0] for tree in estimate[:2])
    variances = np.sum(matrix**2, axis=1) - np.diag(matrix) ** 2
    np.testing.assert_allclose(error, np.sqrt(variances / 302), rtol=0.2)
    scores = (value - np.diag(matrix)) / error
    assert np.max(np.abs(scores)) < 4
    assert 0.5 < np.sqrt(np.mean(scores**2)) < 1.6
    assert estimate.num_probes == 302


def test_the_diagonal_of_a_diagonal_matrix_is_exact():
    entries = np.random.default_rng(0).normal(size=N)
    estimate = diagonal(cases.matrix_curvature(np.diag(entries)), KEY, num_probes=2)
    np.testing.assert_allclose(
        np.concatenate([x.ravel() for x in jax.tree.leaves(estimate.value)]), entries, rtol=1e-13
    )
    assert all(np.all(error < 1e-14) for error in jax.tree.leaves(estimate.standard_error))


def test_batches_have_the_diagonal_of_the_whole_with_the_same_probes():
    options = {"num_probes": 4, "relative_error": 1e-3, "max_probes": 8, "chunk_size": 2}
    got, want = (diagonal(curvature, KEY, **options) for curvature in in_batches_and_whole())
    assert got.num_probes == 8
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-14), got, want)


def test_a_diagonal_under_jit_is_that_outside():
    curvature = cases.mlp_hessian()
    got = jax.jit(lambda curvature: diagonal(curvature, KEY, num_probes=4))(curvature)
    want = diagonal(curvature, KEY, num_probes=4, chunk_size=2)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-8), got, want)


# Of any size.

SIZES = (1e-30, 1e-25, 1e-19, 1e19, 1e30)


def hessian_of_size(size):
    matrix, _ = cases.matrix_with(power_law(20, 0.5), dtype=np.float32)
    return cases.matrix_curvature(matrix * np.float32(size))


@functools.partial(jax.jit, static_argnames="method")
def traces_and_diagonals(curvature, keys, method):
    return jax.vmap(lambda key: (trace(curvature, key, method=method), diagonal(curvature, key)))(keys)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_a_float32_hessian_of_any_size_has_the_errors_of_one_of_size_1(size, method):
    keys = jax.random.split(KEY, 3)
    got, want = (traces_and_diagonals(hessian_of_size(scale), keys, method) for scale in (size, 1))
    for a, b in zip(jax.tree.leaves([x[:2] for x in got]), jax.tree.leaves([x[:2] for x in want]), strict=True):
        assert np.all(b != 0)
        np.testing.assert_allclose(np.asarray(a, float) / size, b, rtol=1e-3, atol=1e-4 * np.max(np.abs(b)))


@pytest.mark.parametrize("function", [trace, functools.partial(trace, method="xtrace"), diagonal])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_probes_are_added_at_any_size_as_at_size_1(function, size):
    options = {"num_probes": 8, "relative_error": 0.01, "max_probes": 32}
    got, want = (function(hessian_of_size(scale), KEY, **options) for scale in (size, 1))
    assert got.num_probes == want.num_probes > 8


@pytest.mark.parametrize("size", SIZES)
def test_a_mean_of_many_numbers_at_once_has_the_error_of_each_at_its_own_size(size):
    rng = np.random.default_rng(0)
    draws = (rng.normal(size=(10, 3, 2)) * size * np.array([1.0, 1e-3])).astype(np.float32)
    for got in (mean_of(jnp.asarray(draws)), jax.vmap(mean_of, in_axes=1)(jnp.asarray(draws))):
        np.testing.assert_allclose(got.value, np.mean(draws.astype(float), axis=0), rtol=1e-4)
        np.testing.assert_allclose(got.standard_error, np.std(draws.astype(float), axis=0, ddof=1) / 10**0.5, rtol=1e-5)


def test_a_mean_of_zeros_has_no_error_and_a_gradient():
    zeros = jnp.zeros((4, 2), jnp.float32)
    assert all(np.all(x == 0) for x in mean_of(zeros)[:2])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(mean_of(x).value))(zeros), 0.25)
    draws = jnp.float32(1e-25) * jnp.arange(8, dtype=jnp.float32).reshape(4, 2)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(mean_of(x).value))(draws), 0.25, rtol=1e-6)


# Bad values and arguments.


def test_what_is_not_a_number_stays_so():
    matrix = np.eye(N)
    matrix[N // 2 - 1, N // 2] = matrix[N // 2, N // 2 - 1] = np.nan
    curvature = cases.matrix_curvature(matrix)
    for method in METHODS:
        estimate = trace(curvature, KEY, num_probes=4, relative_error=0.1, method=method)
        assert np.all(np.isnan(estimate[:2]))
        assert estimate.num_probes == 4
    assert np.isnan(diagonal(curvature, KEY, num_probes=2).value["second"][0])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_probes": 1}, "num_probes is 1, wanted at least 2"),
        ({"relative_error": 0.0}, "relative_error is 0.0, wanted it above 0"),
        ({"relative_error": np.nan}, "relative_error is nan, wanted it above 0"),
        ({"relative_error": 0.1, "max_probes": 8}, "max_probes is 8, wanted at least num_probes, which is 16"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"method": "exact"}, "method is 'exact'"),
    ],
)
def test_arguments_out_of_range_are_refused(change, match):
    for function in (trace,) if "method" in change else (trace, diagonal):
        with helpers.raises(ValueError, match):
            function(cases.mlp_hessian(), KEY, **change)


def test_an_error_cannot_be_asked_for_inside_jit():
    with helpers.raises(ValueError, "relative_error is given inside jit"):
        jax.jit(lambda curvature: trace(curvature, KEY, relative_error=0.1))(cases.mlp_hessian())


def test_a_mean_has_the_standard_error_of_its_samples():
    samples = np.random.default_rng(0).normal(size=50)
    estimate = mean_of(jnp.asarray(samples))
    np.testing.assert_allclose(estimate, [np.mean(samples), np.std(samples, ddof=1) / np.sqrt(50), 50])
    with helpers.raises(ValueError, "num_probes is 1"):
        mean_of(jnp.ones(1))
    assert exactly(jnp.asarray(3.0)) == (3, 0, 0)
