"""The geometry that the class means and the classifier collapse to: the simplex equiangular tight frame (NC2, NC3)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flatjax.collapse.class_means import ClassMeans


def equinorm(rows: Float[Array, "C m"], kept: Bool[Array, " C"]) -> Float[Array, ""]:
    """Standard deviation (C − 1 in the denominator) over mean of the norms of the kept rows."""
    norms = _norms(rows)
    num_kept = jnp.sum(kept).astype(rows.dtype)
    mean = jnp.sum(jnp.where(kept, norms, 0)) / num_kept
    return _sqrt(jnp.sum(jnp.where(kept, (norms - mean) ** 2, 0)) / (num_kept - 1)) / mean


def equiangularity(rows: Float[Array, "C m"], classes: ClassMeans) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean of |cos(x_c, x_c') + 1/(C − 1)| over c ≠ c', and the standard deviation of the cosines."""
    num_kept = classes.num_kept.astype(rows.dtype)
    directions = rows / jnp.where(classes.kept, _norms(rows), 1)[:, None]
    cosines = directions @ directions.T
    num_pairs = num_kept * (num_kept - 1)

    def mean_over_pairs(values: Float[Array, "C C"]) -> Float[Array, ""]:
        return jnp.sum(jnp.where(classes.pairs, values, 0)) / num_pairs

    deviation = _sqrt(mean_over_pairs((cosines - mean_over_pairs(cosines)) ** 2))
    return mean_over_pairs(jnp.abs(cosines + 1 / (num_kept - 1))), deviation


def etf_error(classes: ClassMeans) -> Float[Array, ""]:
    """‖M̄ᵀM̄/‖M̄ᵀM̄‖_F − (I − 11ᵀ/C)/√(C − 1)‖_F."""
    num_kept = classes.num_kept.astype(classes.centred.dtype)
    frame = _unit(classes.centred)
    own = jnp.diag(classes.kept.astype(frame.dtype))
    both = (classes.kept[:, None] & classes.kept[None, :]).astype(frame.dtype)
    return _norm(_unit(frame @ frame.T) - (own - both / num_kept) / jnp.sqrt(num_kept - 1))


def etf_floor(classes: ClassMeans) -> Float[Array, ""]:
    """√(2 − 2√(m/(C − 1))), below which no m features bring the ETF error where m < C − 1; 0 elsewhere."""
    num_features = classes.centred.shape[1]
    share = num_features / (classes.num_kept - 1).astype(classes.centred.dtype)
    return jnp.sqrt(2 - 2 * jnp.sqrt(jnp.minimum(share, 1)))


def self_duality(weight: Float[Array, "C m"], classes: ClassMeans) -> Float[Array, ""]:
    """NC3 = ‖W/‖W‖_F − M̄ᵀ/‖M̄‖_F‖_F²."""
    return jnp.sum((_unit(jnp.where(classes.kept[:, None], weight, 0)) - _unit(classes.centred)) ** 2)


def _sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """√x with the gradient 0 at 0, where collapse ends: the metric is at its minimum there."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))


def _norms(rows: Float[Array, "C m"]) -> Float[Array, " C"]:
    return _sqrt(jnp.sum(rows**2, axis=1))


def _norm(matrix: Float[Array, "a b"]) -> Float[Array, ""]:
    return _sqrt(jnp.sum(matrix**2))


def _unit(matrix: Float[Array, "a b"]) -> Float[Array, "a b"]:
    return matrix / _norm(matrix)
