"""Squared distances between the rows of a matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def squared_distances(rows: Float[Array, "d m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair, from the differences: to rounding, however close two rows are.

    Of d²·m operations, but not on matrix units, and of memory d² in a compiled program.
    """
    return jnp.sum((rows[:, None, :] - rows[None, :, :]) ** 2, axis=2)


@squared_distances.defjvp
def _squared_distances_jvp(
    primals: tuple[Float[Array, "d m"]], tangents: tuple[Float[Array, "d m"]]
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """2⟨x_s − x_t, ẋ_s − ẋ_t⟩ by products of matrices: the differences themselves would be d²·m numbers to keep."""
    rows, changes = _centred(primals[0]), _centred(tangents[0])
    own, mixed = jnp.sum(rows * changes, axis=1), rows @ changes.T
    return squared_distances(*primals), 2 * (own[:, None] + own[None, :] - mixed - mixed.T)


def squared_distances_by_products(rows: Float[Array, "d m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair, from one product of matrices: to a few ε·(‖x_s − x̄‖² + ‖x_t − x̄‖²).

    Never negative, and on the diagonal exactly 0, with exactly no derivative.
    """
    centred = _centred(rows)
    products = centred @ centred.T
    norms = jnp.diagonal(products)
    distances = norms[:, None] + norms[None, :] - 2 * products
    # Rounding may leave the distance of two equal rows negative.
    return jnp.where(jnp.eye(len(rows), dtype=bool) | (distances < 0), 0, distances)


def _centred(rows: Float[Array, "d m"]) -> Float[Array, "d m"]:
    """What all rows share has no part in their distances, but in their rounding errors."""
    return rows - jnp.mean(rows, axis=0, keepdims=True)
