"""Squared distances between the rows of a matrix."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_distances(rows: Float[Array, "d m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair, exactly 0 on the diagonal.

    One matrix product of the centred rows: what all rows share would cancel, so it goes first. The error of an entry is
    a few ε·(‖x_s − x̄‖² + ‖x_t − x̄‖²).
    """
    centred = rows - jnp.mean(rows, axis=0, keepdims=True)
    norms = jnp.sum(centred**2, axis=1)
    distances = norms[:, None] + norms[None, :] - 2 * (centred @ centred.T)
    # Rounding may leave the distance of equal rows negative, and that of a row to itself positive, which an attention
    # on one row alone would magnify: p_s² ≈ 1 against p_s p_t ≈ 1e-12.
    return jnp.where(jnp.eye(len(rows), dtype=bool) | (distances < 0), 0, distances)
