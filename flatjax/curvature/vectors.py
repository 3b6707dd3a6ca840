"""Trees of arrays as vectors: draws, inner products and combinations, each leaf where it lies and as it is sharded.

Several vectors are one tree, each leaf with a further first axis.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.core.sharding import explicit_mesh, placed_like
from flatjax.core.trees import Tree
from flatjax.core.units import unit_near


def num_entries(like: Tree) -> int:
    """The number of entries of one vector."""
    return sum(leaf.size for leaf in jax.tree.leaves(like))


def rademacher_like(like: Tree, key: Key[Array, ""]) -> Tree:
    """Draws independent entries ±1."""
    return _drawn(lambda key, leaf: placed_like(random_signs(key, leaf.shape, leaf.dtype), leaf), like, key)


def normal_like(like: Tree, key: Key[Array, ""]) -> Tree:
    """Draws independent entries of a standard normal distribution."""

    def draw(key: Key[Array, ""], leaf: Array) -> Array:
        sharding = jax.typeof(leaf).sharding if explicit_mesh(leaf) else None
        return jax.random.normal(key, leaf.shape, leaf.dtype, out_sharding=sharding)

    return _drawn(draw, like, key)


def random_signs(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """Draws independent entries ±1, 32 from one random word.

    A word each would take longer than the product they are for.
    """
    size = math.prod(shape)
    if size >= 2**32:  # whose places an unsigned integer cannot count
        return jax.random.rademacher(key, shape, dtype)
    words = jax.random.bits(key, (-(-size // 32),), jnp.uint32)
    # Each entry looks up its own bit: entries that are cut away, as padding or in other shards, need not be made.
    place = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        place = place * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = (words.at[place >> 5].get(mode="promise_in_bounds") >> (place & 31)) & 1
    return 1 - 2 * bits.astype(jnp.int32).astype(dtype)


def inner_product(x: Tree, y: Tree) -> Float[Array, ""]:
    """The inner product ⟨x, y⟩ of two vectors."""
    dtype = computing_dtype(x)
    terms = jax.tree.map(lambda a, b: jnp.sum(a.astype(dtype) * b.astype(dtype)), x, y)
    return sum(jax.tree.leaves(terms), start=jnp.zeros((), dtype))


def norm(x: Tree) -> Float[Array, ""]:
    """The norm ‖x‖, where no square overflows or underflows."""
    size, scaled = _in_units_of_the_largest(x)
    return size * jnp.sqrt(inner_product(scaled, scaled))


def unit(x: Tree) -> Tree:
    """The direction x/‖x‖ in the dtype of sums; 0 for 0, and NaN if an entry is not finite."""
    _, scaled = _in_units_of_the_largest(x)
    length = jnp.sqrt(inner_product(scaled, scaled))
    by = jnp.where(length == 0, 1, jnp.where(jnp.isfinite(length), length, jnp.nan))
    # Not divided twice: a compiler divides once instead, by a product that overflows.
    return jax.tree.map(lambda leaf: leaf * (1 / by), scaled)


def scale(factor: Float[Array, ""], x: Tree) -> Tree:
    """The product c x of a number and a vector."""
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, x)


def inner_products(xs: Tree, ys: Tree) -> Float[Array, "k l"]:
    """The inner products ⟨x_i, y_j⟩ of two stacks."""
    dtype = computing_dtype(xs)

    def of_leaf(a: Array, b: Array) -> Float[Array, "k l"]:
        axes = tuple(range(1, a.ndim))
        return jnp.tensordot(
            a.astype(dtype), b.astype(dtype), axes=(axes, axes), precision="highest", out_sharding=_replicated(a)
        )

    products = jax.tree.leaves(jax.tree.map(of_leaf, xs, ys))
    return sum(products[1:], start=products[0])


def combinations(coefficients: Float[Array, "k l"], xs: Tree) -> Tree:
    """The combinations Σ_i c_ij x_i, a stack of l vectors."""
    return jax.tree.map(
        lambda leaf: jnp.tensordot(coefficients.astype(leaf.dtype), leaf, axes=((0,), (0,)), precision="highest"), xs
    )


def zeros_stack(like: Tree, num_vectors: int) -> Tree:
    """A stack of several vectors of zeros."""
    return jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.zeros_like(leaf)[None], (num_vectors, *leaf.shape)), like)


def at(xs: Tree, index: Integer[Array, ""] | int) -> Tree:
    """The vector of a stack at an index."""
    return jax.tree.map(lambda leaf: leaf[index], xs)


def with_vector(xs: Tree, index: Integer[Array, ""] | int, x: Tree) -> Tree:
    """The stack with another vector at an index; unchanged where there is no such index."""
    return jax.tree.map(lambda leaf, value: leaf.at[index].set(value, mode="drop"), xs, x)


def orthonormalised(x: Tree, basis: Tree, key: Key[Array, ""]) -> tuple[Tree, Float[Array, " k"], Float[Array, ""]]:
    """Splits x = Σ_i c_i b_i + r u into u, c and r, for a stack of orthonormal vectors b_i, some of which may be 0.

    Where nothing is left of x, r is 0 and u a random direction; there must be one.
    """
    left, coefficients = _without(x, basis, 2)
    length = norm(left)
    limits = jnp.finfo(length.dtype)
    is_spent = length <= 10 * limits.eps * norm(x) + limits.tiny

    def random_direction() -> Tree:
        # In a small space little may be left of that, too: hence once more.
        direction, _ = _without(normal_like(x, key), basis, 3)
        return scale(1 / norm(direction), direction)

    unit = jax.lax.cond(is_spent, random_direction, lambda: scale(1 / length, left))
    return unit, coefficients, jnp.where(is_spent, 0, length)


def _without(x: Tree, basis: Tree, times: int) -> tuple[Tree, Float[Array, " k"]]:
    """x less its part in a basis, taken away several times, as once leaves rounding errors; and that part."""
    total = jnp.zeros(len(jax.tree.leaves(basis)[0]), computing_dtype(x))
    for _ in range(times):
        coefficients = inner_products(basis, jax.tree.map(lambda leaf: leaf[None], x))
        x = jax.tree.map(lambda leaf, along: leaf - along[0], x, combinations(coefficients, basis))
        total = total + coefficients[:, 0]
    return x, total


def _in_units_of_the_largest(x: Tree) -> tuple[Float[Array, ""], Tree]:
    """The unit, and x in it: numbers whose squares can be summed."""
    dtype = computing_dtype(x)
    sizes = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jax.tree.leaves(x)]
    unit = unit_near(functools.reduce(jnp.maximum, sizes, jnp.zeros((), dtype)))
    return unit, jax.tree.map(lambda leaf: leaf.astype(dtype) / unit, x)


def _drawn(draw: Callable[[Key[Array, ""], Array], Array], like: Tree, key: Key[Array, ""]) -> Tree:
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(structure, [draw(keys[i], leaf) for i, leaf in enumerate(leaves)])


def _replicated(leaf: Array) -> NamedSharding | None:
    """The sharding that must be said of a sum over axes that are split explicitly."""
    mesh = jax.typeof(leaf).sharding.mesh
    return NamedSharding(mesh, PartitionSpec()) if mesh.explicit_axes else None
