"""Alignment and coupling of matrices that are known to share their singular vectors, or to share none."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.representations import (
    Projections,
    SingularTriplets,
    block_coupling,
    block_couplings,
    inverse_norm_growth,
    numerical_ranks,
    projections,
    residual_alignment,
)

M = 9


def triplets_of(matrices):
    U, S, Vt = np.linalg.svd(matrices)
    return SingularTriplets(*map(jnp.asarray, (U, S, np.swapaxes(Vt, 1, 2), np.zeros_like(S))))


def random_matrices(num, m=M, seed=0):
    return np.random.default_rng(seed).normal(size=(num, m, m))


def aligned_matrices(num):
    rng = np.random.default_rng(1)
    U, V = (np.linalg.qr(rng.normal(size=(M, M)))[0] for _ in range(2))
    sizes = np.sort(rng.uniform(0.1, 1, (num, M)))[:, ::-1]
    return [U * s @ V.T for s in sizes]


@pytest.mark.parametrize("top", [1, 4, M])
def test_a_jacobian_couples_fully_with_itself_and_its_multiples(top):
    J = random_matrices(1)[0]
    for other in (J, 3 * J, -J):
        assert block_coupling(J, other, top=top) < 1e-13


def test_jacobians_of_the_same_singular_vectors_couple_fully():
    first, second = aligned_matrices(2)
    assert block_coupling(first, second, top=4) < 1e-13
    # |P| − S_1 has each of its entries once more if the sign of J is lost.
    assert block_coupling(first, second[::-1], top=4) > 0.5


@pytest.mark.parametrize(("m", "low", "high"), [(32, 0.8, 1.05), (96, 0.9, 1.02), (256, 0.95, 1.01)])
def test_random_jacobians_hardly_couple_the_less_the_larger_they_are(m, low, high):
    first, second = random_matrices(2, m)
    assert low < block_coupling(first, second, top=10) < high


def test_coupling_alignment_and_projections_are_those_of_numpy():
    matrices, top = random_matrices(3), 4
    U, S, Vt = np.linalg.svd(matrices)
    triplets = triplets_of(matrices).top(top)
    between = projections(matrices, triplets)
    couplings, alignment = block_couplings(triplets, between), residual_alignment(between)
    shares = []
    for i, J in enumerate(matrices):
        for j in range(3):
            A, B = U[j, :, :top].T @ J @ Vt[j, :top].T, Vt[j, :top] @ J @ U[j, :, :top]
            np.testing.assert_allclose(between.forward[i, j], A, atol=1e-12)
            np.testing.assert_allclose(between.backward[i, j], B, atol=1e-12)
            want = np.linalg.norm(np.abs(A) - np.diag(S[i, :top])) / np.linalg.norm(S[i, :top])
            np.testing.assert_allclose(couplings[i, j], want, atol=1e-12)
            np.testing.assert_allclose(block_coupling(J, matrices[j], top=top), want, atol=1e-12)
            for got, P in zip(alignment[:2], (np.abs(A), np.abs(B)), strict=True):
                off = np.mean(P[~np.eye(top, dtype=bool)]) / np.mean(np.diag(P))
                np.testing.assert_allclose(got[i, j], off, atol=1e-12)
            if i != j:
                shares.append(alignment.forward[i, j])
    np.testing.assert_allclose(alignment.score, np.mean(shares), rtol=1e-12)


def test_blocks_that_share_their_singular_vectors_are_aligned_and_others_are_not():
    aligned = np.stack(aligned_matrices(3))
    for matrices, low, high in ((aligned, 0, 1e-12), (random_matrices(3), 0.5, 1.5)):
        score = residual_alignment(projections(matrices, triplets_of(matrices).top(4))).score
        assert low <= score < high


def test_of_one_block_there_is_no_alignment_with_others():
    J = random_matrices(1)
    assert np.isnan(residual_alignment(projections(J, triplets_of(J).top(3))).score)


def test_coupling_runs_under_jit_and_vmap_and_in_bfloat16():
    first, second = random_matrices(2, seed=3)
    want = block_coupling(first, second, top=3)
    run = jax.jit(jax.vmap(lambda first, second: block_coupling(first, second, top=3)))
    np.testing.assert_allclose(run(first[None], second[None]), [want], rtol=1e-12)
    narrow = block_coupling(first.astype(jnp.bfloat16), second.astype(jnp.bfloat16), top=3)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, want, rtol=0.05)


@pytest.mark.parametrize("which", [0, 1])
def test_bad_values_give_no_coupling(which):
    matrices = random_matrices(2)
    matrices[which, 1, 2] = np.nan
    assert np.isnan(block_coupling(*matrices, top=3))
    assert np.isnan(block_coupling(0 * random_matrices(1)[0], random_matrices(1)[0], top=3))


def test_the_rank_of_a_jacobian_is_counted_above_the_tolerance():
    rank_3 = random_matrices(1, seed=4)[0][:, :3] @ random_matrices(1, seed=5)[0][:3]
    sizes = np.linalg.svd(np.stack([rank_3, np.eye(M), 0 * rank_3]))[1]
    sizes = np.concatenate([sizes, np.full((1, M), np.nan)])
    np.testing.assert_array_equal(numerical_ranks(sizes, tolerance=1e-10), [3, M, 0, -1])


def test_the_growth_of_the_inverse_norm_is_the_line_of_least_squares():
    norms = np.random.default_rng(0).uniform(0.5, 2, 8)
    (slope, intercept), covariance = np.polyfit(np.arange(8), 1 / norms, 1, cov=True)
    fit = inverse_norm_growth(np.stack([norms, norms / 2], axis=1))
    np.testing.assert_allclose(fit.slope, slope, rtol=1e-11)
    np.testing.assert_allclose(fit.intercept, intercept, rtol=1e-12)
    np.testing.assert_allclose(fit.slope_standard_error, covariance[0, 0] ** 0.5, rtol=1e-11)
    np.testing.assert_allclose(fit.r_squared, np.corrcoef(np.arange(8), 1 / norms)[0, 1] ** 2, rtol=1e-10)
    assert np.isnan(inverse_norm_growth(jnp.asarray(norms[:2, None])).r_squared)
    assert np.isnan(inverse_norm_growth(np.ones((2, 1))).slope_standard_error)


ONE = Projections(jnp.ones((2, 2, 1, 1)), jnp.ones((2, 2, 1, 1)))


@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda: residual_alignment(ONE), "of 1 singular vector"),
        (lambda: inverse_norm_growth(np.ones((1, 3))), r"has shape \(1, 3\)"),
        (lambda: block_coupling(np.ones((3, 3)), np.ones((4, 4)), top=1), r"first has shape \(3, 3\) and second"),
        (lambda: block_coupling(np.ones((3, 3)), np.ones((3, 3)), top=4), "top is 4, wanted 1 to 3"),
        (lambda: projections(np.ones((2, 3, 3)), triplets_of(random_matrices(2))), r"jacobians has shape \(2, 3, 3\)"),
        (lambda: block_couplings(triplets_of(random_matrices(2)), ONE), "projections.forward has shape"),
        (lambda: triplets_of(random_matrices(2)).top(M + 1), "num_triplets is 10, wanted 1 to 9"),
    ],
)
def test_what_does_not_fit_is_refused(run, match):
    with helpers.raises(ValueError, match):
        run()
