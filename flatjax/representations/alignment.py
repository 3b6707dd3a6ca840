"""Residual alignment: whether the blocks of a network stretch the stream along the same directions."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from flatjax.core import results
from flatjax.core.metric import metric
from flatjax.representations.projections import Projections


class ResidualAlignment(NamedTuple):
    """The ratio mean |off-diagonal| / mean |diagonal| at [i, j], for blocks i and j.

    0 is aligned, about 1 is not at all.
    """

    forward: Float[Array, "l l"]
    """The ratio for |U_jᵀ J_i V_j|; 0 where i = j."""
    backward: Float[Array, "l l"]
    """The ratio for |V_jᵀ J_i U_j|; 0 where i = j."""
    score: Float[Array, ""]
    """The mean of `forward` over i ≠ j; NaN for one block."""

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def residual_alignment(projections: Projections) -> ResidualAlignment:
    """Measures residual alignment (RA2) between all pairs of blocks.

    Args:
        projections: those on the top K ≥ 2 singular vectors, from `projections` or `residual_projections`.

    Returns:
        A `ResidualAlignment`, without a unit.

    Raises:
        ValueError: K is 1, which leaves nothing off the diagonal.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import residual_jacobians
        >>> from flatjax.representations import projections, residual_alignment
        >>> blocks = [lambda x: x + x @ jnp.diag(jnp.array([s, 1.0, 0.0], x.dtype)) for s in (2.0, 3.0)]
        >>> triplets = residual_jacobians(blocks, jnp.ones((2, 1, 4, 3), jnp.float32), position=0)
        >>> alignment = residual_alignment(projections(triplets.matrices(), triplets.top(2)))
        >>> print(f"{alignment.score:.4f}")
        0.0000

    References:
        Li, Papyan: *Residual Alignment: Uncovering the Mechanisms of Residual Networks*, NeurIPS 2023.
    """
    top = projections.forward.shape[-1]
    if top < 2:
        raise ValueError("projections are of 1 singular vector a block, wanted at least 2")
    forward, backward = (_off_diagonal_share(matrices) for matrices in projections)
    num_blocks = len(forward)
    between = jnp.sum(jnp.where(jnp.eye(num_blocks, dtype=bool), 0, forward))
    num_pairs = num_blocks * (num_blocks - 1)
    return ResidualAlignment(forward, backward, between / num_pairs if num_pairs else jnp.full_like(between, jnp.nan))


@metric
def numerical_ranks(singular_values: Float[ArrayLike, "*l k"], *, tolerance: float) -> Int[Array, "*l"]:
    """Counts the singular values above `tolerance` times the largest: RA3 is that they are at most the classes.

    For the top k triplets it is at most k. A Jacobian of 0 has the rank 0, one that is not finite −1.

    Example:
        >>> import jax.numpy as jnp
        >>> print(numerical_ranks(jnp.array([[2.0, 1.0, 1e-9], [3.0, 2.0, 1.0]]), tolerance=1e-6))
        [2 3]
    """
    sizes = jnp.asarray(singular_values)
    largest = jnp.max(sizes, axis=-1, keepdims=True)
    ranks = jnp.sum(sizes > tolerance * largest, axis=-1, dtype=jnp.int32)
    return jnp.where(jnp.all(jnp.isfinite(sizes), axis=-1), ranks, -1)


class LineFit(NamedTuple):
    """A line that is fitted through points, one a layer."""

    slope: Float[Array, ""]
    """The slope, for a step of one layer."""
    slope_standard_error: Float[Array, ""]
    """The slope's standard error if the points scatter independently of each other; NaN for two points."""
    intercept: Float[Array, ""]
    """The value at the first layer."""
    r_squared: Float[Array, ""]
    """The coefficient of determination, 1 for a line; NaN for two points."""

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def inverse_norm_growth(singular_values: Float[ArrayLike, "l k"]) -> LineFit:
    """Fits a line through 1/σ_1(J_l) over the depth (RA4), by least squares.

    Args:
        singular_values: those of each block (l, k), l at least 2, as `residual_jacobians(...).S`.

    Raises:
        ValueError: fewer than 2 blocks.

    Example:
        >>> import jax.numpy as jnp
        >>> fit = inverse_norm_growth(jnp.array([[1.0], [1 / 2], [1 / 3], [1 / 4]]))
        >>> print(f"{fit.slope:.3f} {fit.intercept:.3f} {fit.r_squared:.3f}")
        1.000 1.000 1.000

    References:
        Li, Papyan: *Residual Alignment: Uncovering the Mechanisms of Residual Networks*, NeurIPS 2023.
    """
    sizes = jnp.asarray(singular_values)
    if sizes.ndim != 2 or len(sizes) < 2:
        raise ValueError(f"singular_values has shape {sizes.shape}, wanted (l, k) of 2 blocks or more")
    y = 1 / jnp.max(sizes, axis=1)
    layers = jnp.arange(len(y), dtype=y.dtype)
    x = layers - jnp.mean(layers)
    slope = jnp.sum(x * y) / jnp.sum(x**2)
    deviations = y - jnp.mean(y)
    squares = jnp.sum((deviations - slope * x) ** 2)
    degrees = len(y) - 2
    variance = squares / degrees if degrees else jnp.full_like(squares, jnp.nan)
    return LineFit(
        slope=slope,
        slope_standard_error=jnp.sqrt(variance / jnp.sum(x**2)),
        intercept=jnp.mean(y) - slope * jnp.mean(layers),
        r_squared=1 - squares / jnp.sum(deviations**2) if degrees else jnp.full_like(squares, jnp.nan),
    )


def _off_diagonal_share(matrices: Float[Array, "l l k k"]) -> Float[Array, "l l"]:
    top = matrices.shape[-1]
    sizes, is_diagonal = jnp.abs(matrices), jnp.eye(top, dtype=bool)
    off = jnp.sum(jnp.where(is_diagonal, 0, sizes), axis=(-2, -1)) / (top * (top - 1))
    return off / (jnp.sum(jnp.where(is_diagonal, sizes, 0), axis=(-2, -1)) / top)
