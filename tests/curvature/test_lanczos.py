"""Eigenvalues at the ends of known spectra, each found as often as it is there, and no other."""

import functools

import helpers
import jax
import numpy as np
import pytest

from flatjax.curvature.lanczos import Tridiagonal, extreme_eigenpairs, lanczos
from flatjax.curvature.products import Hessian
from flatjax.curvature.streams import Streamed

from . import cases

KEY = jax.random.key(0)
SPECTRA = {
    "a power law": np.arange(1.0, 61) ** -2,
    "clustered at the top": np.concatenate([[2.0, 2 - 1e-3, 2 - 2e-3], np.linspace(-1, 1, 57)]),
    "of both signs": np.concatenate([[-3.0, 2.5, 1.9], np.linspace(-0.5, 0.5, 57)]),
    "with a bulk at 0": np.concatenate([[5.0, -4.0, 1.0], np.zeros(57)]),
}


@functools.partial(jax.jit, static_argnames=("num_pairs", "num_steps", "which"))
def eigenpairs(curvature, key, *, num_pairs, num_steps, which):
    return extreme_eigenpairs(curvature, key, num_pairs=num_pairs, num_steps=num_steps, which=which)


eigenpairs_of = jax.jit(Tridiagonal.eigenpairs)
matrix_of = jax.jit(Tridiagonal.matrix)


def in_order(eigenvalues, which):
    keys = {"largest": -eigenvalues, "smallest": eigenvalues, "magnitude": -np.abs(eigenvalues)}
    return eigenvalues[np.argsort(keys[which], kind="stable")]


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_the_ends_of_known_spectra_are_found(name, which):
    eigenvalues = SPECTRA[name]
    matrix, _ = cases.matrix_with(eigenvalues)
    num_pairs = 1 if which == "smallest" and name == "a power law" else 2
    # Outside jit Lanczos' method is compiled once for all ends.
    curvature = cases.matrix_curvature(matrix)
    pairs = extreme_eigenpairs(curvature, KEY, num_pairs=num_pairs, num_steps=50, which=which)
    want = in_order(eigenvalues, which)[:num_pairs]
    np.testing.assert_allclose(pairs.eigenvalues, want, atol=1e-6)
    x = cases.ravelled(pairs.eigenvectors)
    np.testing.assert_allclose(x @ x.T, np.eye(num_pairs), atol=1e-12)
    residuals = np.linalg.norm(x @ matrix - np.asarray(pairs.eigenvalues)[:, None] * x, axis=1)
    np.testing.assert_allclose(pairs.residuals, residuals, atol=1e-13)


def test_a_residual_bounds_the_distance_to_an_eigenvalue_where_the_steps_are_too_few():
    eigenvalues = np.linspace(-1, 2, 50)
    matrix, _ = cases.matrix_with(eigenvalues)
    pairs = eigenpairs(cases.matrix_curvature(matrix), KEY, num_pairs=4, num_steps=6, which="largest")
    distances = np.min(np.abs(np.asarray(pairs.eigenvalues)[:, None] - eigenvalues), axis=1)
    assert np.all(distances <= pairs.residuals)
    assert np.all(pairs.residuals > 1e-3)


def test_no_eigenvalue_is_found_twice_in_100_steps_of_float32():
    eigenvalues = np.concatenate([[100.0, 50.0, 25.0, -30.0], np.linspace(0, 1, 196)])
    matrix, _ = cases.matrix_with(eigenvalues, dtype=np.float32)
    tridiagonal = lanczos(cases.matrix_curvature(matrix), KEY, num_steps=100)
    basis = cases.ravelled(tridiagonal.basis)
    assert np.max(np.abs(basis @ basis.T - np.eye(100))) < 3e-6
    found = np.linalg.eigvalsh(np.asarray(matrix_of(tridiagonal), float))
    for eigenvalue in (100, 50, 25, -30):
        assert np.sum(np.abs(found - eigenvalue) < 1) == 1
    np.testing.assert_allclose(np.sort(found)[-3:], [25, 50, 100], rtol=1e-5)
    # Without orthogonalising against all vectors there are several copies of each.
    assert np.sum(three_term_eigenvalues(matrix, 100) > 99) > 1


def three_term_eigenvalues(matrix, num_steps):
    v, last, beta, T = (
        np.random.default_rng(0).normal(size=len(matrix)).astype(np.float32),
        0,
        0,
        np.zeros((num_steps,) * 2),
    )
    v /= np.linalg.norm(v)
    for i in range(num_steps):
        w = matrix @ v - beta * last
        T[i, i] = v @ w
        w = w - np.float32(T[i, i]) * v
        beta = np.linalg.norm(w)
        if i + 1 < num_steps:
            T[i, i + 1] = T[i + 1, i] = beta
        v, last = w / beta, v
    return np.linalg.eigvalsh(T)


def test_a_basis_makes_the_matrix_tridiagonal():
    matrix, _ = cases.matrix_with(np.linspace(-1, 2, 30))
    diagonal, off_diagonal, basis = tridiagonal = lanczos(cases.matrix_curvature(matrix), KEY, num_steps=8)
    Q = cases.ravelled(basis)
    T = np.asarray(matrix_of(tridiagonal))
    np.testing.assert_allclose(Q @ matrix @ Q.T, T, atol=1e-13)
    left = matrix @ Q.T - Q.T @ T
    np.testing.assert_allclose(np.linalg.norm(left, axis=0), np.eye(8)[-1] * float(off_diagonal[-1]), atol=1e-13)
    assert diagonal.shape == off_diagonal.shape == (8,)


REPEATED = {
    "two eigenvalues": [2.0] * 3 + [-1.0] * 4,
    "the identity": [1.0] * 7,
    "zero": [0.0] * 7,
    "rank 1": [3.0] + [0.0] * 6,
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize(("dtype", "atol"), [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_a_space_that_is_spanned_early_is_left_for_another(name, dtype, atol):
    matrix, _ = cases.matrix_with(REPEATED[name], dtype=dtype)
    tridiagonal = lanczos(cases.matrix_curvature(matrix), KEY, num_steps=30)
    assert tridiagonal.diagonal.shape == (7,)
    basis = cases.ravelled(tridiagonal.basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(7), atol=10 * atol)
    np.testing.assert_allclose(eigenpairs_of(tridiagonal)[0], np.sort(REPEATED[name]), atol=10 * atol)


@pytest.mark.parametrize("n", [1, 3])
def test_matrices_smaller_than_the_number_of_steps_have_all_their_eigenvalues(n):
    matrix, _ = cases.matrix_with(np.arange(1.0, n + 1))
    pairs = extreme_eigenpairs(cases.matrix_curvature(matrix), KEY, num_pairs=n, num_steps=20, which="smallest")
    np.testing.assert_allclose(pairs.eigenvalues, np.arange(1, n + 1), atol=1e-12)
    np.testing.assert_allclose(pairs.residuals, 0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_the_size_of_a_float32_curvature_does_not_matter(size):
    eigenvalues = np.concatenate([[4.0, 2.0], np.linspace(-1, 1, 5)])
    matrix, _ = cases.matrix_with(eigenvalues)
    curvature = cases.matrix_curvature((size * matrix).astype(np.float32))
    pairs = extreme_eigenpairs(curvature, KEY, num_pairs=2, num_steps=20)
    np.testing.assert_allclose(np.asarray(pairs.eigenvalues, float), [4 * size, 2 * size], rtol=3e-6)
    assert np.all(np.asarray(pairs.residuals, float) < 1e-5 * size)


def test_a_network_has_the_eigenpairs_of_its_dense_hessian_whole_or_in_batches():
    x, y = cases.samples()
    leaves = ("head/kernel", "hidden/bias")
    params, matrix = cases.mlp_params(), cases.mlp_matrix(leaves)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    in_batches = Streamed(lambda x, y: Hessian(cases.loss_fn, params, (x, y), leaves), batches)
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    for curvature in (cases.mlp_hessian(leaves=leaves), in_batches):
        pairs = extreme_eigenpairs(curvature, KEY, num_pairs=2, num_steps=15)
        assert jax.tree.structure(pairs.eigenvectors) == jax.tree.structure(curvature.like)
        np.testing.assert_allclose(pairs.eigenvalues, eigenvalues[-2:][::-1], rtol=1e-9)
        overlaps = cases.ravelled(pairs.eigenvectors) @ eigenvectors[:, -2:][:, ::-1]
        np.testing.assert_allclose(np.abs(overlaps), np.eye(2), atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_has_no_eigenvalues(bad):
    matrix = np.eye(7)
    matrix[2, 3] = matrix[3, 2] = bad
    pairs = extreme_eigenpairs(cases.matrix_curvature(matrix), KEY, num_pairs=2, num_steps=20)
    assert np.all(np.isnan(pairs.eigenvalues))
    assert np.all(np.isnan(pairs.residuals))


def test_arguments_out_of_range_are_refused():
    curvature = cases.mlp_hessian()
    with helpers.raises(ValueError, "num_steps is 0"):
        lanczos(curvature, KEY, num_steps=0)
    for num_pairs in (0, 6):
        with helpers.raises(ValueError, f"num_pairs is {num_pairs}, wanted 1 to 5"):
            extreme_eigenpairs(curvature, KEY, num_pairs=num_pairs, num_steps=5)
    with helpers.raises(ValueError, "num_pairs is 27, wanted 1 to 26"):
        extreme_eigenpairs(curvature, KEY, num_pairs=27, num_steps=50)
    with helpers.raises(ValueError, "which is 'top'"):
        extreme_eigenpairs(curvature, KEY, num_steps=5, which="top")
