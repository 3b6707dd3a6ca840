"""Squared distances and inner products between rows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.custom_jvp
@jax.jit
def squared_distances(rows: Float[Array, "d m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair from the differences, right to rounding however close two rows are.

    It takes d²·m operations, which do not run on matrix units, and a memory of d².
    """
    return jnp.sum((rows[:, None, :] - rows[None, :, :]) ** 2, axis=2)


@squared_distances.defjvp  # pyrefly: ignore[bad-argument-type]
def _squared_distances_jvp(
    primals: tuple[Float[Array, "d m"]], tangents: tuple[Float[Array, "d m"]]
) -> tuple[Float[Array, "d d"], Float[Array, "d d"]]:
    """The derivative 2⟨x_s − x_t, ẋ_s − ẋ_t⟩ by products of matrices: the differences would be d²·m numbers to keep."""
    rows, changes = (x - jnp.mean(x, axis=0, keepdims=True) for x in (*primals, *tangents))
    own, mixed = jnp.sum(rows * changes, axis=1), jnp.matmul(rows, changes.T, precision="highest")
    return squared_distances(*primals), 2 * (own[:, None] + own[None, :] - mixed - mixed.T)


def squared_distances_around(rows: Float[Array, "d m"], centre: Float[Array, " m"]) -> Float[Array, "d d"]:
    """‖x_s − x_t‖² of every pair from one product of matrices, right to a few ε·(‖x_s − c‖² + ‖x_t − c‖²).

    It is never negative. On the diagonal it is exactly 0, with exactly no derivative.
    """
    centred = rows - jax.lax.stop_gradient(centre)[None, :]
    products = centred @ centred.T
    norms = jnp.diagonal(products)
    distances = norms[:, None] + norms[None, :] - 2 * products
    # Rounding may leave the distance of two equal rows negative.
    return jnp.where(jnp.eye(len(rows), dtype=bool) | (distances < 0), 0, distances)


def products_between(
    one: Float[Array, "t m"], other: Float[Array, "u m"], pairs: Bool[Array, "t u"]
) -> Float[Array, "t u"]:
    """The inner products ⟨x_s, y_t⟩ of all pairs; which `pairs` are asked for makes no difference."""
    del pairs
    return jnp.matmul(one, other.T, precision="highest")


@jax.custom_jvp
def squared_distances_between(
    one: Float[Array, "t m"], other: Float[Array, "u m"], pairs: Bool[Array, "t u"]
) -> Float[Array, "t u"]:
    """‖x_s − y_t‖² of the pairs asked for, to some ten ε/`CLOSE` of itself, and to rounding if there are few rows.

    Where distances are small against the norms, |x|² + |y|² − 2⟨x, y⟩ leaves few digits. These are computed from the
    differences, as many at once as are worth it, until none is left.
    """
    if max(len(one), len(other)) <= FEW:
        return jnp.sum((one[:, None, :] - other[None, :, :]) ** 2, axis=2)
    squares = jnp.sum(one**2, axis=1)[:, None] + jnp.sum(other**2, axis=1)[None, :]
    distances = squares - 2 * jnp.matmul(one, other.T, precision="highest")
    close = pairs & (distances < CLOSE * squares)

    def any_left(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return jnp.any(state[1])

    def refined(state: tuple[Array, Array]) -> tuple[Array, Array]:
        distances, close = state
        s, t = jnp.nonzero(close, size=min(_CLOSE_AT_ONCE, close.size), fill_value=len(one) + len(other))
        from_difference = jnp.sum((one[s] - other[t]) ** 2, axis=1)
        return distances.at[s, t].set(from_difference, mode="drop"), close.at[s, t].set(False, mode="drop")

    return jax.lax.while_loop(any_left, refined, (distances, close))[0]


@squared_distances_between.defjvp  # pyrefly: ignore[bad-argument-type]
def _squared_distances_between_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """The derivative 2⟨x_s − y_t, ẋ_s − ẏ_t⟩ by products of matrices, as above."""
    (one, other, pairs), (d_one, d_other, _) = primals, tangents
    own = jnp.sum(one * d_one, axis=1)[:, None] + jnp.sum(other * d_other, axis=1)[None, :]
    mixed = jnp.matmul(d_one, other.T, precision="highest") + jnp.matmul(one, d_other.T, precision="highest")
    return squared_distances_between(one, other, pairs), 2 * (own - mixed)


FEW = 128
"""The most rows for which all distances may be computed from the differences."""
CLOSE = 1 / 64
"""How small a squared distance is, against the squares of the norms, for the differences to be needed."""

_CLOSE_AT_ONCE = 4096
