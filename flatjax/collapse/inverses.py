"""Pseudo-inverses of rows of very different sizes, each known to rounding of its own size.

If one class mean is 10⁹ times further than the others, a singular value decomposition leaves them no digit: it is exact
to rounding of the largest row. So rows X are factored as Q R, the largest of them eliminated first, in directions in
which the largest come first. Then each row is rounded to its own size (Cox and Higham), and so is each row of the
triangular R. These are brought to one length, R = D B, where B can be inverted, and X⁺ = B⁺ D⁻¹ Qᵀ.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flatjax.core.sharding import sum_over_devices
from flatjax.core.units import root_of_squares


class Inverse(NamedTuple):
    """The pseudo-inverse of rows X, or of their XᵀX."""

    matrix: Float[Array, "m _"]
    rank: Float[Array, ""]
    """The number of directions in which the rows are told from 0."""
    known: Float[Array, ""]
    """1, or NaN if there are rows that differ from 0 in other directions too."""


class Rows(NamedTuple):
    """Rows X, each known to rounding of its size, which is that of what it is made of."""

    values: Float[Array, "k m"]
    sizes: Float[Array, " k"]
    known: Float[Array, ""]
    """1, or NaN if a row is no more than rounding, or hidden by that of larger ones."""

    @classmethod
    def of(cls, values: Float[Array, "k m"], sizes: Float[Array, " k"] | None = None) -> "Rows":
        """Makes rows of the given `sizes`, by default of their own."""
        lengths = root_of_squares(jax.lax.stop_gradient(values).T)
        sizes = lengths if sizes is None else jnp.maximum(jax.lax.stop_gradient(sizes), lengths)
        is_rounding = (lengths > 0) & (lengths <= _ROUNDINGS * float(jnp.finfo(values.dtype).eps) * sizes)
        return cls(values, sizes, jnp.where(jnp.any(is_rounding), jnp.nan, jnp.ones((), values.dtype)))


@jax.custom_jvp
def pseudo_inverse(rows: Rows) -> Inverse:
    """The pseudo-inverse X⁺ (m, k).

    Its derivative is finite at equal singular values, where that of a decomposition is not.
    """
    k, m = rows.values.shape
    if k >= m:
        return _inverse(rows)
    # In an orthonormal basis of theirs: each column of a QR decomposition is rounded to its own size.
    basis, coordinates = jnp.linalg.qr(rows.values.T)
    inverse = _inverse(rows._replace(values=coordinates.T))
    return inverse._replace(matrix=basis @ inverse.matrix)


@pseudo_inverse.defjvp
def _pseudo_inverse_jvp(primals: tuple[Rows], tangents: tuple[Rows]) -> tuple[Inverse, Inverse]:
    (rows,), (tangent,) = primals, tangents
    inverse, X, change = pseudo_inverse(rows), rows.values, tangent.values
    P = inverse.matrix
    if X.shape[0] > X.shape[1]:
        of_rows, of_columns = (P @ P.T) @ change.T, (change.T @ P.T) @ P
    else:
        of_rows, of_columns = P @ (P.T @ change.T), change.T @ (P.T @ P)
    beyond = of_rows - (of_rows @ X) @ P + of_columns - P @ (X @ of_columns)
    return inverse, Inverse(beyond - (P @ change) @ P, jnp.zeros_like(inverse.rank), jnp.zeros_like(inverse.known))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def inverse_of_gram(names: tuple[str, ...], rows: Rows) -> Inverse:
    """(XᵀX)⁺ (m, m) for many rows, which need not be on one device, without squaring what they are conditioned by."""
    inverse = pseudo_inverse(_few(names, rows))
    return inverse._replace(matrix=inverse.matrix @ inverse.matrix.T)


# A QR decomposition has no derivative at lower rank, and that of a pseudo-inverse of all rows is of their size.
@inverse_of_gram.defjvp
def _inverse_of_gram_jvp(
    names: tuple[str, ...], primals: tuple[Rows], tangents: tuple[Rows]
) -> tuple[Inverse, Inverse]:
    (rows,), (tangent,) = primals, tangents
    result, X = inverse_of_gram(names, rows), rows.values
    inverse = result.matrix
    half = sum_over_devices(X.T @ tangent.values, names)
    change = half + half.T
    # On what the rows span: as precise as a few rows are, with the derivative of a product.
    few = jax.lax.stop_gradient(_few(names, rows))
    product = inverse @ sum_over_devices(X.T @ X, names)
    span = pseudo_inverse(few).matrix @ few.values + (product - jax.lax.stop_gradient(product))
    beyond = inverse @ inverse @ change @ (jnp.eye(len(span), dtype=span.dtype) - span.T)
    return result, Inverse(
        beyond + beyond.T - inverse @ change @ inverse, jnp.zeros_like(result.rank), jnp.zeros_like(result.known)
    )


def _inverse(rows: Rows) -> Inverse:
    """Inverts at least as many rows as columns."""
    epsilon = float(jnp.finfo(rows.values.dtype).eps)
    factors = _factored(rows)
    Q, R, is_seen = factors.Q, factors.R, factors.is_seen
    lengths = jnp.where(is_seen, root_of_squares(R.T), 1)
    columns, sizes, directions = jnp.linalg.svd(jnp.where(is_seen[:, None], R / lengths[:, None], 0))
    is_used = sizes > 4 * epsilon * sizes[0]
    graded = _product_with_inverse(directions, sizes, is_used, columns) / lengths[None, :]
    rank = jnp.sum(is_used, dtype=jnp.int32)

    # Where rows of R depend on others, D⁻¹ would weigh them by their lengths: then as if all were of one size.
    are_apart = rank == jnp.sum(is_seen, dtype=jnp.int32)
    columns, sizes, directions = jnp.linalg.svd(R)
    is_kept = sizes > 4 * epsilon * sizes[0]
    plain = _product_with_inverse(directions, sizes, is_kept, columns)
    left = root_of_squares(jnp.where(is_kept[:, None], 0, directions @ factors.turned.T))
    are_in = jnp.all(left <= _LOST * root_of_squares(factors.turned.T) + _ROUNDINGS * epsilon * rows.sizes)
    return Inverse(
        factors.directions.T @ jnp.where(are_apart, graded, plain) @ Q.T,
        jnp.where(are_apart, rank, jnp.sum(is_kept, dtype=jnp.int32)).astype(R.dtype),
        factors.known * jnp.where(are_apart | are_in, 1, jnp.nan).astype(R.dtype),
    )


def _product_with_inverse(directions: Array, sizes: Array, is_used: Array, columns: Array) -> Float[Array, "m m"]:
    return (directions.T * jnp.where(is_used, 1 / jnp.where(is_used, sizes, 1), 0)[None, :]) @ columns.T


class _Factors(NamedTuple):
    """The factors of X Vᵀ = Q R. The rows of V are directions in the order of how large X is in them.

    So are R's columns.
    """

    directions: Float[Array, "m m"]
    turned: Float[Array, "k m"]
    Q: Float[Array, "k m"]
    R: Float[Array, "m m"]
    is_seen: Bool[Array, " m"]
    """Which rows of R are more than rounding."""
    known: Float[Array, ""]


def _factored(rows: Rows) -> _Factors:
    """Factors at least as many rows as columns."""
    directions = jnp.linalg.svd(jnp.linalg.qr(rows.values, mode="r"))[2]
    turned, order = rows.values @ directions.T, jnp.argsort(-rows.sizes)
    Q, R = jnp.linalg.qr(turned[order])
    Q = jnp.zeros_like(Q).at[order].set(Q)

    roundings = _ROUNDINGS * float(jnp.finfo(R.dtype).eps) * rows.sizes
    lengths = root_of_squares(R.T)
    # A direction is seen by rows that differ from 0 in it by more than they are rounded by, ...
    is_seen = jnp.sum(jnp.where(jnp.abs(Q) * lengths[None, :] > roundings[:, None], Q**2, 0), axis=0) > 0.5
    # ... and not in what much larger rows leave of it.
    is_hidden = jnp.sum(jnp.where(roundings[:, None] > _LOST * lengths[None, :], Q**2, 0), axis=0) > 1e-3
    lost = root_of_squares((jnp.where(is_seen[None, :], 0, Q) @ R).T)
    known = ~jnp.any(is_seen & is_hidden) & jnp.all(lost <= _LOST * root_of_squares(turned.T) + roundings)
    return _Factors(directions, turned, Q, R, is_seen, rows.known * jnp.where(known, 1, jnp.nan).astype(R.dtype))


def _few(names: tuple[str, ...], rows: Rows) -> Rows:
    """A few rows F of the same FᵀF = XᵀX, the same on all devices."""
    rows = _reduced(jax.lax.stop_gradient(rows))
    if not names:
        return rows

    values, sizes = of_all_devices(rows.values, names), of_all_devices(rows.sizes, names)
    return _reduced(Rows(values, sizes, sum_over_devices(rows.known, names) / jax.lax.axis_size(names)))


def of_all_devices(x: Array, names: tuple[str, ...]) -> Array:
    """Puts the arrays of all devices one after the other, by a sum.

    The compiler knows that it is the same on all devices.
    """
    of_devices = jnp.zeros((jax.lax.axis_size(names), *x.shape), x.dtype).at[jax.lax.axis_index(names)].set(x)
    return sum_over_devices(of_devices, names).reshape(-1, *x.shape[1:])


def _reduced(rows: Rows) -> Rows:
    """Reduces the rows to no more than there are columns."""
    if len(rows.values) <= rows.values.shape[1]:
        return rows
    factors = _factored(rows)
    return Rows(factors.R @ factors.directions, root_of_squares(factors.Q * rows.sizes[:, None]), factors.known)


_ROUNDINGS = 8
"""How much a row may be off, in units of ε times its size."""

_LOST = 0.1
"""The share of a row that may be missing from what is left of it, and of a direction that may be rounding."""
