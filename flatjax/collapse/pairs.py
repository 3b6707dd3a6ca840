"""Sums over all pairs of classes in tiles, on products of matrices, and never an array of all pairs.

Only one of (c, c') and (c', c) is computed. If classes are split among devices, each device compares its own with each
other, and then with those of half of the others, which go around in a ring.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from flatjax.core.distances import products_between, squared_distances_between
from flatjax.core.double_word import Double
from flatjax.core.integers import whole_number
from flatjax.core.sharding import num_devices, sum_over_devices, varying_like

TILE_SIZE = 512
"""The tile size for which a product of matrices of some hundred columns is as fast as a larger one."""

Terms = Callable[[Float[Array, "t u"], Any, Any], Any]
"""A function of how the classes of a tile relate, and of what else is known of each side.

It gives arrays (t, u) to sum.
"""


def sum_over_distances(
    terms: Terms, rows: Float[Array, "C m"], columns: Any, use: Bool[Array, " C"], **how: Any
) -> Any:
    """Σ over the unordered pairs of rows to use of terms of their squared distance, and of what `columns` say of them.

    A distance is known to 1e-5 of itself in float32 however close the rows are, and to rounding if there are few.
    """
    return _sum_over_pairs(terms, squared_distances_between, rows, columns, use, **how)


def sum_over_products(terms: Terms, rows: Float[Array, "C m"], columns: Any, use: Bool[Array, " C"], **how: Any) -> Any:
    """Σ over the unordered pairs of rows to use of terms of their inner product."""
    return _sum_over_pairs(terms, products_between, rows, columns, use, **how)


def _sum_over_pairs(
    terms: Terms,
    between: Callable[[Float[Array, "t m"], Float[Array, "u m"], Bool[Array, "t u"]], Float[Array, "t u"]],
    rows: Float[Array, "C m"],
    columns: Any,
    use: Bool[Array, " C"],
    *,
    tile_size: int | None = None,
    axis_names: tuple[str, ...] = (),
) -> Any:
    num_rows = len(rows)
    # A part for each device, so that each computes on rows it holds. Inside a `jax.shard_map` a device has one already.
    num_parts = 1 if axis_names else math.gcd(num_rows, num_devices(rows))
    size = num_rows // num_parts
    tile_size = tile_of(tile_size, size)
    num_tiles = -(-size // tile_size)
    parts = jax.tree.map(lambda x: x.reshape(num_parts, size, *x.shape[1:]), (rows, columns, use))

    def tile(part: Any, i: Array) -> tuple[Any, Array]:
        """Cuts out a tile. A last tile begins early, to be as large as the others.

        Its rows of another tile are not used again.
        """
        start = jnp.minimum(i * tile_size, size - tile_size)
        rows, columns, use = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, tile_size), part)
        places = start + jnp.arange(tile_size, dtype=start.dtype)
        return (rows, columns, use & (places >= i * tile_size)), places

    # Without checkpoint the gradient would keep every tile's relations: together the array of all pairs.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
    def of_tiles(is_own: bool, one: Any, other: Any, i: Array, j: Array) -> Any:
        (a, of_a, use_a), places_a = tile(one, i)
        (b, of_b, use_b), places_b = tile(other, j)
        pairs = use_a[:, None] & use_b[None, :]
        if is_own:
            pairs &= places_a[:, None] < places_b[None, :]
        # 1 for pairs that are not asked for: a quotient or a logarithm of 0 would make their derivative NaN.
        relation = jnp.where(pairs, between(a, b, pairs), 1)
        return jax.tree.map(lambda x: jnp.sum(jnp.where(pairs, x, 0), axis=0), terms(relation, of_a, of_b))

    def of_parts(is_own: bool, one: Any, other: Any) -> Any:
        """Sums tile after tile, column by column, as doubles: in a sum of 10⁹ numbers float32 would lose digits."""
        i, j = (x.ravel() for x in np.indices((num_tiles, num_tiles), np.int32))
        # Within a part the tiles below the diagonal are those above it again; between two parts each one is new.
        asked = i <= j if is_own else i >= 0
        tiles = jnp.asarray(i[asked]), jnp.asarray(j[asked])

        def step(sums: Any, tile: tuple[Array, Array]) -> tuple[Any, None]:
            added = of_tiles(is_own, one, other, *tile)
            return jax.tree.map(lambda s, x: s.plus(x), sums, added, is_leaf=_is_double), None

        shapes = jax.eval_shape(functools.partial(of_tiles, is_own), one, other, tiles[0][0], tiles[1][0])
        nothing = varying_like(jax.tree.map(lambda x: Double.zeros(x.shape, x.dtype), shapes), one)
        return jax.lax.scan(step, nothing, tiles)[0]

    of_all_parts = _map_first_axis(of_parts, num_parts)
    sums = of_all_parts(True, parts, parts)

    # After d steps around the ring each part meets the one d places on: half a round is enough for every pair of parts.
    num_places = num_parts * (jax.lax.axis_size(axis_names) if axis_names else 1)
    if num_places > 1:

        def around(carry: tuple[Any, Any], distance: Array) -> tuple[tuple[Any, Any], None]:
            sums, others = carry
            others = jax.tree.map(functools.partial(_from_next, axis_names=axis_names), others)
            added = of_all_parts(False, parts, others)
            # Halfway around, two parts meet twice.
            added = jax.tree.map(lambda x: jnp.where(2 * distance == num_places, 0.5, 1).astype(x.dtype) * x, added)
            return (jax.tree.map(Double.plus_double, sums, added, is_leaf=_is_double), others), None

        distances = jnp.arange(1, num_places // 2 + 1, dtype=jnp.int32)
        (sums, _), _ = jax.lax.scan(around, (sums, parts), distances)
    return jax.tree.map(lambda x: sum_over_devices(jnp.sum(x.value), axis_names), sums, is_leaf=_is_double)


def tile_of(tile_size: int | None, num_rows: int) -> int:
    """The tile size, as many rows as were asked for but no more than there are.

    Raises:
        TypeError, ValueError: it is no whole number, or below 1.
    """
    return min(TILE_SIZE if tile_size is None else whole_number(tile_size, "tile_size", least=1), num_rows)


def _is_double(x: Any) -> bool:
    return isinstance(x, Double)


def _map_first_axis(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    def mapped(is_own: bool, *parts: Any) -> Any:
        if size > 1:
            return jax.vmap(functools.partial(function, is_own))(*parts)
        # An axis of one entry would make two products of matrices of one.
        sums = function(is_own, *(jax.tree.map(lambda x: jnp.squeeze(x, 0), part) for part in parts))
        return jax.tree.map(lambda x: x[None], sums)

    return mapped


def _from_next(part: Array, axis_names: tuple[str, ...]) -> Array:
    """Fetches the array of the next part around the ring."""
    if not axis_names:
        return jnp.roll(part, -1, axis=0)
    num_devices = jax.lax.axis_size(axis_names)
    return jax.lax.ppermute(part, axis_names, [((i + 1) % num_devices, i) for i in range(num_devices)])
