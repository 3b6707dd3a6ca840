"""Residual Jacobians against dense autodiff in float64, and what is made of them against NumPy."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax import residual_jacobians
from flatjax.models import Decoder, DecoderConfig
from flatjax.representations import (
    block_coupling,
    block_couplings,
    projections,
    residual_alignment,
    residual_projections,
)
from flatjax.representations.jacobians import OVERSAMPLING

from . import cases
from .cases import L, M, T

KEY = jax.random.key(0)


def dense_block(J, x):
    """Of the Jacobian J, at any x."""
    return x + x @ J.T


def matrix_blocks(matrices):
    return [jax.tree_util.Partial(dense_block, jnp.asarray(J)) for J in matrices]


def stream_for(matrices):
    num_blocks, m, _ = np.shape(matrices)
    return np.random.default_rng(5).normal(size=(num_blocks, 1, 2, m))


def decaying(m, num_matrices=2, rate=0.7, seed=0):
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.normal(size=(num_matrices, m, m)))[0] for _ in range(2))
    return U * rate ** np.arange(m) @ np.swapaxes(V, 1, 2)


def assert_triplets_of(triplets, matrices, top, rtol=1e-11):
    U, S, Vt = np.linalg.svd(matrices)
    np.testing.assert_allclose(triplets.S, S[:, :top], rtol=rtol)
    # A pair of vectors is known up to its sign: so compare what they multiply to.
    got = np.einsum("lik,ljk->lkij", triplets.U, triplets.V)
    np.testing.assert_allclose(got, np.einsum("lik,lkj->lkij", U[..., :top], Vt[:, :top]), atol=1e3 * rtol)


@pytest.mark.parametrize(("position", "sequence"), [(0, 0), (2, 1), (-1, -1)])
def test_exact_triplets_are_those_of_the_dense_jacobian(position, sequence):
    params, stream = cases.network()
    blocks = cases.blocks_of(params)
    want = cases.dense_jacobians(blocks, stream, position, sequence)
    triplets = residual_jacobians(blocks, stream, position, sequence=sequence, chunk_size=3)
    assert_triplets_of(triplets, want, M)
    np.testing.assert_allclose(triplets.matrices(), want, atol=1e-13)
    assert np.max(triplets.residuals) < 1e-13


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_neither_chunks_nor_what_leaves_the_last_block_change_anything(chunk_size):
    params, stream = cases.network()
    blocks = cases.blocks_of(params)
    want = residual_jacobians(blocks, stream, 1, top=3)
    got = residual_jacobians(blocks, stream[:-1], np.int32(1), top=3, chunk_size=chunk_size)
    np.testing.assert_allclose(got.S, want.S, rtol=1e-12)


@pytest.mark.parametrize("tied", [True, False], ids=["rotary", "learned positions"])
def test_the_metrics_of_a_tiny_decoder_are_those_of_its_dense_jacobians(tied):
    config = DecoderConfig(
        vocab_size=11,
        width=8,
        depth=3,
        num_heads=4,
        num_key_value_heads=2,
        inner_width=12,
        context=6,
        positions="rotary" if tied else "learned",
        norm="rms" if tied else "layer",
        gated=tied,
        tied=tied,
    )
    model = Decoder(config, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    # Blocks as they are first drawn hardly change the stream.
    model = jax.jit(lambda model: jax.tree.map(lambda x: 5 * x if x.ndim == 2 else x, model))(model)
    tokens = jnp.array([[0, 5, 1, 6], [2, 10, 3, 7]])
    stream, top = jax.jit(Decoder.stream)(model, tokens), 3
    want = cases.dense_jacobians(list(model.blocks), stream, 3, sequence=1)
    exact = residual_jacobians(list(model.blocks), stream, 3, sequence=1)
    assert exact.S.dtype == jnp.float64
    np.testing.assert_allclose(exact.matrices(), want, rtol=1e-10, atol=1e-11)
    between = projections(exact.matrices(), exact.top(top))
    without_matrices = residual_projections(list(model.blocks), stream, 3, exact.top(top), sequence=1)
    couplings = block_couplings(exact.top(top), between)
    alignment = residual_alignment(between)
    for got, other in zip(between, without_matrices, strict=True):
        np.testing.assert_allclose(got, other, rtol=1e-9, atol=1e-11)
    U, S, Vt = np.linalg.svd(want)
    for i in range(3):
        for j in range(3):
            A = np.abs(U[j, :, :top].T @ want[i] @ Vt[j, :top].T)
            distance = np.linalg.norm(A - np.diag(S[i, :top])) / np.linalg.norm(S[i, :top])
            np.testing.assert_allclose(couplings[i, j], distance, atol=1e-9)
            np.testing.assert_allclose(block_coupling(want[i], want[j], top=top), distance, atol=1e-9)
            off = (A.sum() - np.trace(A)) / (top * (top - 1))
            np.testing.assert_allclose(alignment.forward[i, j], off / (np.trace(A) / top), atol=1e-9)
    assert np.max(S) > 0.1


def test_without_a_matrix_the_largest_triplets_are_found():
    matrices = decaying(40)
    got = residual_jacobians(matrix_blocks(matrices), stream_for(matrices), 1, top=4, key=KEY, num_iterations=6)
    assert_triplets_of(got, matrices, 4, rtol=1e-8)
    assert np.max(got.residuals) < 1e-6


def test_residuals_are_what_they_say_and_bound_the_distance_to_a_singular_value():
    matrices = decaying(60, rate=0.99)
    got = residual_jacobians(matrix_blocks(matrices), stream_for(matrices), 0, top=5, key=KEY, num_iterations=1)
    errors = np.einsum("lij,ljk->lik", matrices, got.V) - got.U * got.S[:, None]
    np.testing.assert_allclose(got.residuals, np.linalg.norm(errors, axis=1), rtol=1e-10)
    np.testing.assert_allclose(np.einsum("lij,lik->ljk", matrices, got.U), got.V * got.S[:, None], atol=1e-13)
    sizes = np.linalg.svd(matrices)[1]
    found = np.asarray(got.S)
    distances = np.min(np.abs(found[:, :, None] - sizes[:, None]), axis=2)
    assert np.all(distances <= got.residuals)
    assert np.min(got.residuals) > 1e-3
    assert np.all(found <= sizes[:, :5] * (1 + 1e-12))
    assert np.any(found < 0.99 * sizes[:, :5])


def test_iterations_bring_the_residuals_down():
    matrices = decaying(60, rate=0.9)
    of = functools.partial(residual_jacobians, matrix_blocks(matrices), stream_for(matrices), 0, top=3, key=KEY)
    few, more = (np.max(of(num_iterations=n).residuals) for n in (0, 4))
    assert more < 0.01 * few


def test_where_all_directions_would_be_searched_the_exact_method_takes_over():
    matrices = decaying(3 + OVERSAMPLING)
    got = residual_jacobians(matrix_blocks(matrices), stream_for(matrices), 0, top=3, key=KEY)
    assert_triplets_of(got, matrices, 3)


@pytest.mark.parametrize("key", [None, KEY], ids=["exact", "iterated"])
def test_blocks_of_one_structure_are_compiled_once(key):
    traced = []

    def block(J, x):
        traced.append(1)
        return x + jnp.tanh(x @ J)

    matrices = decaying(20, num_matrices=5)
    blocks = [jax.tree_util.Partial(block, jnp.asarray(J)) for J in matrices]
    residual_jacobians(blocks, stream_for(matrices), 0, top=2, key=key)
    once = len(traced)
    residual_jacobians(blocks, stream_for(matrices), 1, top=2, key=key)
    assert len(traced) == once < 5


def test_functions_that_are_no_trees_are_blocks_too():
    stream = jnp.asarray(cases.network()[1])
    blocks = [lambda x: x + 0.5 * x**2, jnp.sin, lambda x: 3 * x]
    got = residual_jacobians(blocks, stream, 2).matrices()
    x = np.asarray(stream[:3, 0, 2])
    want = [np.diag(x[0]), np.diag(np.cos(x[1]) - 1), 2 * np.eye(M)]
    np.testing.assert_allclose(got, want, atol=1e-13)


def test_it_runs_inside_jit_at_a_traced_position():
    params, stream = cases.network()

    @jax.jit
    def singular_values(params, stream, position):
        return residual_jacobians(cases.blocks_of(params), stream, position).S

    want = np.linalg.svd(cases.dense_jacobians(cases.blocks_of(params), stream, 2))[1]
    np.testing.assert_allclose(singular_values(params, stream, 2), want, rtol=1e-11)
    np.testing.assert_allclose(singular_values(params, stream, 2 - T), want, rtol=1e-11)
    for beyond in (T, -T - 1):
        assert np.all(np.isnan(singular_values(params, stream, beyond)))


@pytest.mark.parametrize("options", [{}, {"top": 2, "key": KEY}], ids=["exact", "iterated"])
def test_a_block_that_is_not_finite_gives_no_number_and_the_others_theirs(options):
    matrices = decaying(20, num_matrices=3)
    matrices[1, 3, 4] = np.nan
    got = residual_jacobians(matrix_blocks(matrices), stream_for(matrices), 0, **options)
    for leaf in got:
        assert np.all(np.isnan(leaf[1]))
        assert np.all(np.isfinite(leaf[::2]))


def test_a_block_that_adds_nothing_has_a_jacobian_of_zero():
    stream = np.ones((1, 1, 2, 30))
    for options in ({}, {"top": 3, "key": KEY}):
        got = residual_jacobians([lambda x: x], stream, 0, **options)
        np.testing.assert_array_equal(got.S, 0)
        np.testing.assert_array_equal(got.residuals, 0)


def test_bfloat16_blocks_give_float32_as_near_as_they_can():
    params, stream = cases.network(dtype=np.float32)
    blocks = cases.blocks_of(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    got = residual_jacobians(blocks, stream.astype(jnp.bfloat16), 1)
    want = residual_jacobians(cases.blocks_of(params), stream, 1)
    assert got.S.dtype == want.S.dtype == jnp.float32
    np.testing.assert_allclose(got.S, want.S, atol=0.05)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("options", [{}, {"top": 2, "key": KEY}], ids=["exact", "iterated"])
def test_sharded_blocks_give_what_whole_ones_give(options, axis_type):
    matrices = decaying(24)
    blocks, stream = matrix_blocks(matrices), np.repeat(stream_for(matrices), 8, axis=1)
    want = residual_jacobians(blocks, stream, 1, **options)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        spec = P("model") if axis_type == AxisType.Auto else P(None, "model")
        placed = jax.device_put(blocks, NamedSharding(mesh, spec))
        split = jax.device_put(stream, NamedSharding(mesh, P(None, "model")))
        got = residual_jacobians(placed, split, 1, **options)
        between = residual_projections(placed, split, 1, got.top(2))
    np.testing.assert_allclose(got.S, want.S, rtol=1e-10)
    np.testing.assert_allclose(
        np.abs(between.forward), np.abs(residual_projections(blocks, stream, 1, want.top(2)).forward), atol=1e-6
    )


def test_jacobians_are_exported_for_every_platform():
    params, stream = cases.network(dtype=np.float32)

    @jax.jit
    def run(params, stream, key):
        blocks = cases.blocks_of(params)
        return residual_jacobians(blocks, stream, 0, top=2), residual_jacobians(blocks, stream, 0, top=2, key=key)

    assert jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(params, stream, KEY).platforms[2] == "tpu"


STREAM = np.ones((L + 1, 2, T, M))
BLOCKS = [jnp.sin] * L


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda: residual_jacobians(BLOCKS, STREAM[:2], 0), ValueError, "there are 3 blocks"),
        (lambda: residual_jacobians([], STREAM[:1], 0), ValueError, "there are 0 blocks"),
        (lambda: residual_jacobians(BLOCKS, STREAM[0], 0), ValueError, r"stream has shape \(2, 4, 7\)"),
        (lambda: residual_jacobians(BLOCKS, STREAM.astype(int), 0), TypeError, "stream has dtype int64"),
        (lambda: residual_jacobians(BLOCKS, STREAM, T), ValueError, "position is 4, but stream has 4"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0.5), TypeError, "position is 0.5, wanted one integer"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0, sequence=2), ValueError, "sequence is 2, but stream has 2"),
        (lambda: residual_jacobians([1, 2, 3], STREAM, 0), TypeError, "a block is a int"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0, top=0), ValueError, "top is 0, wanted 1 to 7"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0, top=8), ValueError, "top is 8, wanted 1 to 7"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0, key=KEY), ValueError, "got a key, but top is None"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0, chunk_size=0), ValueError, "chunk_size is 0"),
        (lambda: residual_jacobians(BLOCKS, STREAM, 0, num_iterations=-1), ValueError, "num_iterations is -1"),
        (
            lambda: residual_jacobians([lambda x: x[0]] * L, STREAM, 0),
            ValueError,
            r"returns the shape \(4, 7\) for \(1, 4, 7\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run, error, match):
    with helpers.raises(error, match):
        run()
