"""Measure how many directions a spectrum fills, in the conventions in use."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from flatjax.core import results
from flatjax.core.integers import whole_number

FIT_RANGE = (11, 98)
"""The eigenvalues, counted from 1, to which α-ReQ is fitted by default: the range of the published code."""

SAMPLES_A_FEATURE = 10
"""How many samples a feature needs: with fewer the sample's covariance has another spectrum than the distribution's."""


class RepresentationGeometry(NamedTuple):
    """The result of `representation_geometry`: scalars without a unit, but for the variances.

    λ_1 ≥ λ_2 ≥ ... are the eigenvalues of the covariance of the features, and σ_i = √λ_i.
    """

    rankme: Float[Array, ""]
    """RankMe as it was published: exp of the entropy of σ/Σσ, between 1 and m."""
    rankme_of_variances: Float[Array, ""]
    """exp of the entropy of λ/Σλ, never larger: what one published code has under the same name."""
    participation_ratio: Float[Array, ""]
    """The participation ratio (Σλ)²/Σλ², never larger than either."""
    alpha_req: Float[Array, ""]
    """The exponent α of λ_i ∝ i^−α, from log λ_i and log i by least squares with weights 1/i over the fit range."""
    alpha_req_r_squared: Float[Array, ""]
    """The share of the variance of log λ_i that the line explains, with the same weights."""
    variances: Float[Array, " m"]
    """The eigenvalues λ in descending order; those that cannot be told from rounding are 0."""
    num_resolved: Int[Array, ""]
    """The number of eigenvalues above rounding.

    If it is below m and N − 1, the features lie in fewer dimensions, or the precision was not enough to see all; the
    measures are those of the resolved ones.
    """
    num_samples: Int[Array, ""]
    """The number N of samples of weight above 0."""
    is_rank_limited: Bool[Array, ""]
    """Whether N < 10 m: the spectrum is then one of the sample, and the measures are too low for the distribution."""

    to_dict = results.to_dict
    __str__ = results.to_table


def geometry_of_spectrum(
    sizes: Float[Array, " m"],
    resolution: Float[Array, ""] | float,
    num_samples: ArrayLike,
    fit_range: tuple[int, int],
) -> RepresentationGeometry:
    """Measures a spectrum σ in descending order; what is below `resolution` times the largest is rounding."""
    first, last = checked_fit_range(fit_range)
    m, dtype = len(sizes), sizes.dtype
    largest = jax.lax.stop_gradient(jnp.max(sizes))
    # Squares of 1e-30 leave float32. Of no spread at all there is no spectrum: 0/0.
    sigma = sizes / largest
    resolved = jnp.isnan(sigma) | (sigma > resolution)
    sigma = jnp.where(resolved, sigma, 0)
    variances = sigma**2
    num_resolved = jnp.sum(resolved & ~jnp.isnan(sigma), dtype=jnp.int32)

    alpha = r_squared = jnp.full((), jnp.nan, dtype)
    if last <= m:
        seen = sigma[first - 1 : last]
        are_seen = jnp.all(seen > 0)
        ranks = jnp.arange(first, last + 1, dtype=dtype)
        slope, r_squared = _fitted_line(jnp.log(ranks), 2 * jnp.log(jnp.where(are_seen, seen, 1)), 1 / ranks)
        alpha, r_squared = (jnp.where(are_seen, x, jnp.nan) for x in (-slope, r_squared))
    num_samples = jnp.asarray(num_samples).astype(jnp.int32)
    return RepresentationGeometry(
        rankme=_exponential_of_entropy(sigma),
        rankme_of_variances=_exponential_of_entropy(variances),
        participation_ratio=jnp.sum(variances) ** 2 / jnp.sum(variances**2),
        alpha_req=alpha,
        alpha_req_r_squared=r_squared,
        variances=largest**2 * variances,
        num_resolved=num_resolved,
        num_samples=num_samples,
        is_rank_limited=num_samples < SAMPLES_A_FEATURE * m,
    )


def checked_fit_range(fit_range: tuple[int, int]) -> tuple[int, int]:
    """Raises a ValueError for what is no range of three eigenvalues or more."""
    first, last = (whole_number(end, "fit_range") for end in fit_range)
    if first < 1 or last < first + 2:
        raise ValueError(
            f"fit_range is {fit_range}, wanted (first, last), both included and counted from 1, of at least 3 "
            "eigenvalues"
        )
    return first, last


def _exponential_of_entropy(sizes: Float[Array, " m"]) -> Float[Array, ""]:
    p = sizes / jnp.sum(sizes)
    is_none = p == 0
    return jnp.exp(-jnp.sum(jnp.where(is_none, 0, p * jnp.log(jnp.where(is_none, 1, p)))))


def _fitted_line(
    x: Float[Array, " k"], y: Float[Array, " k"], weights: Float[Array, " k"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Slope and R² of weighted least squares."""
    shares = weights / jnp.sum(weights)
    x, y = x - shares @ x, y - shares @ y
    slope = (shares @ (x * y)) / (shares @ x**2)
    return slope, 1 - (shares @ (y - slope * x) ** 2) / (shares @ y**2)
