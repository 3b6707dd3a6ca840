"""Squared distances between the rows of a matrix."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
@jax.jit
def squared_distances(rows: Float[Array, "d m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair, from the differences: to rounding, however close two rows are.

    Of d²·m operations, but not on matrix units, and of memory d².
    """
    return jnp.sum((rows[:, None, :] - rows[None, :, :]) ** 2, axis=2)


@squared_distances.defjvp  # pyrefly: ignore[bad-argument-type]
def _squared_distances_jvp(
    primals: tuple[Float[Array, "d m"]], tangents: tuple[Float[Array, "d m"]]
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """2⟨x_s − x_t, ẋ_s − ẋ_t⟩ by products of matrices: the differences themselves would be d²·m numbers to keep."""
    rows, changes = (x - jnp.mean(x, axis=0, keepdims=True) for x in (*primals, *tangents))
    own, mixed = jnp.sum(rows * changes, axis=1), jnp.matmul(rows, changes.T, precision="highest")
    return squared_distances(*primals), 2 * (own[:, None] + own[None, :] - mixed - mixed.T)


def squared_distances_around(rows: Float[Array, "d m"], centre: Float[Array, " m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair, from one product of matrices: to a few ε·(‖x_s − c‖² + ‖x_t − c‖²).

    Never negative, and on the diagonal exactly 0, with exactly no derivative.
    """
    centred = rows - jax.lax.stop_gradient(centre)[None, :]
    products = centred @ centred.T
    norms = jnp.diagonal(products)
    distances = norms[:, None] + norms[None, :] - 2 * products
    # Rounding may leave the distance of two equal rows negative.
    return jnp.where(jnp.eye(len(rows), dtype=bool) | (distances < 0), 0, distances)
