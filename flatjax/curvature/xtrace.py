"""XTrace: each test vector in turn probes what the products of the others leave of the trace."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.core.trees import Tree
from flatjax.core.units import unit_near
from flatjax.curvature.estimate import Estimate, mean_of
from flatjax.curvature.products import Curvature
from flatjax.curvature.vectors import (
    inner_products,
    norm,
    normal_like,
    num_entries,
    orthonormalised,
    scale,
    with_vector,
    zeros_stack,
)


class Sketch(NamedTuple):
    """A sketch of a curvature C: k test vectors Ω, C Ω = Q R, and C Q."""

    vectors: Tree
    basis: Tree
    """The orthonormal vectors Q."""
    factor: Float[Array, "k k"]
    """The upper triangular factor R."""
    products: Tree
    """The products C Q."""


def empty_sketch(like: Tree) -> Sketch:
    """A sketch of no test vectors yet."""
    empty = zeros_stack(like, 0)
    return Sketch(empty, empty, jnp.zeros((0, 0), computing_dtype(like)), empty)


def extended(curvature: Curvature, sketch: Sketch, keys: Key[Array, " l"], *, chunk_size: int) -> Sketch:
    """Extends a sketch by further vectors, to no more than a vector has entries.

    Others cannot add to what those span.
    """
    keys = keys[: num_entries(curvature.like) - len(sketch.factor)]
    if not len(keys):
        return sketch
    vectors = _draws(curvature.like, keys)
    images = curvature.products(vectors, chunk_size=chunk_size)
    basis, factor = _factorised(sketch.basis, sketch.factor, images, keys)
    products = curvature.products(jax.tree.map(lambda leaf: leaf[len(sketch.factor) :], basis), chunk_size=chunk_size)
    return Sketch(_joined(sketch.vectors, vectors), basis, factor, _joined(sketch.products, products))


@jax.jit
def trace_of(sketch: Sketch) -> Estimate:
    """The mean over which vector is left out; it has no error where the others already span the whole space."""
    k, n = len(sketch.factor), sum(leaf[0].size for leaf in jax.tree.leaves(sketch.vectors))
    if k < n:
        return mean_of(leave_one_out_traces(sketch))
    # Q is square, and what is left of a vector is rounding errors.
    value = jnp.trace(inner_products(sketch.basis, sketch.products))
    return Estimate(value, jnp.where(jnp.isfinite(value), jnp.zeros_like(value), jnp.nan), jnp.asarray(k, jnp.int32))


def leave_one_out_traces(sketch: Sketch) -> Float[Array, " k"]:
    """The estimates tr(P_i C) + (n − k + 1) uᵢᵀ C u_i, with P_i the projection on the images of all ω_j but ω_i.

    u_i is the direction of (1 − P_i) ω_i, uniform among those that are left. P_i = Q (1 − s_i s_iᵀ) Qᵀ, where s_i is
    column i of R⁻ᵀ, normalised; (1 − P_i) ω_i = ω_i − Q x_i; C ω_i = Q r_i.
    """
    # Near underflow the products of what follows are 0: bring the largest entry to about 1.
    unit = unit_near(jnp.max(jnp.abs(sketch.factor)))
    R = sketch.factor / unit
    k, n = len(R), sum(leaf[0].size for leaf in jax.tree.leaves(sketch.vectors))
    with jax.default_matmul_precision("highest"):
        # A column that depends on those before it has no pivot: any small one tells its direction.
        floor = jnp.finfo(R.dtype).eps
        pivots = jnp.where(jnp.diag(R) <= floor, floor, jnp.diag(R))
        triangle = R - jnp.diag(jnp.diag(R)) + jnp.diag(pivots)
        S = jax.scipy.linalg.solve_triangular(triangle, jnp.eye(k, dtype=R.dtype), trans=1)
        S = S / jnp.max(jnp.abs(S), axis=0, keepdims=True)
        S = S / jnp.linalg.norm(S, axis=0, keepdims=True)

        H = inner_products(sketch.basis, sketch.products) / unit
        W = inner_products(sketch.basis, sketch.vectors)
        X = W - S * jnp.sum(S * W, axis=0)[None, :]
        on_range = jnp.trace(H) - jnp.sum(S * (H @ S), axis=0)
        left = jnp.sum(W * R - 2 * X * R + X * (H @ X), axis=0) / (n - jnp.sum(X**2, axis=0))
        return unit * (on_range + (n - k + 1) * left)


# Of the leaves only the types are used: were they left out, so were their devices.
@functools.partial(jax.jit, keep_unused=True)
def _draws(like: Tree, keys: Key[Array, " l"]) -> Tree:
    """Draws vectors uniformly on the sphere of squared radius n."""

    def draw(key: Key[Array, ""]) -> Tree:
        vector = normal_like(like, key)
        return scale(num_entries(like) ** 0.5 / norm(vector), vector)

    return jax.lax.map(draw, keys)


@jax.jit
def _factorised(
    basis: Tree, factor: Float[Array, "k k"], images: Tree, keys: Key[Array, " l"]
) -> tuple[Tree, Float[Array, "n n"]]:
    """Gram and Schmidt's Q and R, with further columns."""
    k, n = len(factor), len(factor) + len(keys)
    basis = _joined(basis, jax.tree.map(jnp.zeros_like, images))
    factor = jnp.pad(factor, (0, n - k))

    def step(state: tuple[Tree, Array], column: tuple[Tree, Key[Array, ""], Array]) -> tuple[tuple[Tree, Array], None]:
        (basis, factor), (image, key, j) = state, column
        unit, along, length = orthonormalised(image, basis, jax.random.fold_in(key, 1))
        return (with_vector(basis, j, unit), factor.at[:, j].set(along.at[j].set(length))), None

    return jax.lax.scan(step, (basis, factor), (images, keys, jnp.arange(k, n)))[0]


@jax.jit
def _joined(first: Tree, second: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), first, second)
