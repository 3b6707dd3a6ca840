"""Project every block's residual Jacobian on every block's singular vectors.

Alignment and coupling are made of these.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from flatjax.core import results
from flatjax.core.integers import whole_number
from flatjax.core.metric import metric
from flatjax.representations.jacobians import SingularTriplets
from flatjax.representations.operators import (
    Block,
    Point,
    ResidualJacobian,
    points,
    stacked,
)


class Projections(NamedTuple):
    """The Jacobian of block i between the top singular vectors of block j, at [i, j]."""

    forward: Float[Array, "l l k k"]
    """The matrices U_jᵀ J_i V_j, diagonal where i = j."""
    backward: Float[Array, "l l k k"]
    """The matrices V_jᵀ J_i U_j for the same pairs."""

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def projections(jacobians: Float[ArrayLike, "l m m"], triplets: SingularTriplets) -> Projections:
    """Projects Jacobians that are given as matrices on the singular vectors of all blocks.

    Args:
        jacobians: J (l, m, m): `residual_jacobians(...).matrices()` of the exact method.
        triplets: the top k of each block, `residual_jacobians(...).top(k)`.

    Returns:
        `Projections`, two arrays (l, l, k, k).

    Raises:
        ValueError: the matrices are not of as many blocks and features as the triplets.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import residual_jacobians
        >>> from flatjax.representations import projections
        >>> blocks = [lambda x: x + x @ jnp.diag(jnp.array([3.0, 2.0, 1.0], x.dtype)), lambda x: x + x[..., ::-1] * x]
        >>> triplets = residual_jacobians(blocks, jnp.ones((2, 1, 4, 3), jnp.float32), position=0)
        >>> between = projections(triplets.matrices(), triplets.top(2))
        >>> print(" ".join(f"{abs(x):.2f}" for x in between.forward[0, 0].flatten()))
        3.00 0.00 0.00 2.00
    """
    jacobians = jnp.asarray(jacobians).astype(triplets.S.dtype)
    num_blocks, num_features, _ = triplets.V.shape
    if jacobians.shape != (num_blocks, num_features, num_features):
        raise ValueError(
            f"jacobians has shape {jacobians.shape}, wanted {(num_blocks, num_features, num_features)}, as triplets.V "
            f"has {triplets.V.shape}"
        )
    return stacked([_between(J @ _columns(triplets.V), J @ _columns(triplets.U), triplets) for J in jacobians])


def residual_projections(
    blocks: Sequence[Block],
    stream: Float[ArrayLike, "_ n t m"],
    position: int | Integer[ArrayLike, ""],
    triplets: SingularTriplets,
    *,
    sequence: int = 0,
    chunk_size: int = 32,
) -> Projections:
    """Projects the Jacobians of blocks on the singular vectors of all blocks, without forming a matrix.

    Args:
        blocks: as for `residual_jacobians`, and so are the others.
        stream: x_l, (l, n, t, m).
        position: which of the t positions.
        triplets: the top k of each block, from `residual_jacobians(..., top=k, key=key)` with the same arguments.
        sequence: which of the n sequences.
        chunk_size: how many products are in memory at a time.

    Returns:
        `Projections`. They are exact for the vectors they are given.

    Raises:
        TypeError, ValueError: as `residual_jacobians`; and where the triplets are of other blocks.

    Notes:
        It takes 2·l·k products a block: fewer than the m of the exact method if l·k is below m/2.
    """
    chunk_size = whole_number(chunk_size, "chunk_size", least=1)
    at = points(blocks, stream, position, sequence)
    wanted = len(at), at[0].inputs.shape[1]
    if triplets.V.shape[:2] != wanted:
        raise ValueError(f"triplets.V has shape {triplets.V.shape}, wanted {(*wanted, 'k')}, blocks and features")
    return stacked([_of_block(point, triplets, chunk_size=chunk_size) for point in at])


@metric
def _of_block(point: Point, triplets: SingularTriplets, *, chunk_size: int) -> Projections:
    jacobian = ResidualJacobian(point)
    products = jacobian.times(jnp.concatenate([_columns(triplets.V), _columns(triplets.U)], axis=1), chunk_size)
    of_V, of_U = jnp.split(products, 2, axis=1)
    return _between(of_V, of_U, triplets)


def _columns(vectors: Float[Array, "l m k"]) -> Float[Array, "m lk"]:
    """The vectors of all blocks as columns, next to each other."""
    return jnp.moveaxis(vectors, 1, 0).reshape(vectors.shape[1], -1)


def _between(of_V: Float[Array, "m lk"], of_U: Float[Array, "m lk"], triplets: SingularTriplets) -> Projections:
    num_blocks, num_features, top = triplets.V.shape
    of_V, of_U = (x.reshape(num_features, num_blocks, top) for x in (of_V, of_U))
    return Projections(jnp.einsum("jmk,mjr->jkr", triplets.U, of_V), jnp.einsum("jmk,mjr->jkr", triplets.V, of_U))
