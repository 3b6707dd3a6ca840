"""Variability collapse: how wide the classes are against how far they lie apart (NC1, CDNV, NCC)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.collapse.class_means import ClassMeans


def within_over_between(classes: ClassMeans) -> Float[Array, ""]:
    """NC1 = tr(Σ_W Σ_B⁺)/C = E‖M̄⁺(h − μ_c)‖², with Σ_B = M̄M̄ᵀ/C and M̄ = [μ_c − μ_G].

    NaN where all means are one: Σ_B⁺ = 0 would call that collapsed.
    """
    # The one direction in which the means do not differ is known, as they sum to 0: it is given a singular value of its
    # own, that no cut is needed which would take the way between two close means for it. What is cut is rounding.
    num_kept = classes.num_kept.astype(classes.centred.dtype)
    size = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(classes.centred**2) / num_kept))
    sum_direction = jnp.where(classes.kept, size / jnp.sqrt(num_kept), 0)
    extended = jnp.concatenate([classes.centred, sum_direction[:, None]], axis=1)
    # The derivative of a pseudo-inverse is finite where that of a singular value decomposition is not: at equal
    # singular values, which is where collapse leads.
    inverse = jnp.linalg.pinv(extended, rtol=4 * jnp.finfo(extended.dtype).eps)[:-1]
    coordinates = classes.residuals @ inverse
    nc1 = jnp.sum(classes.shares * jnp.sum(coordinates**2, axis=1))
    return jnp.where(jnp.any(classes.centred != 0), nc1, jnp.nan)


def class_distance_normalized_variances(classes: ClassMeans) -> Float[Array, "C C"]:
    """(V_c + V_c')/(2‖μ_c − μ_c'‖²) of every ordered pair of different kept classes, 0 elsewhere."""
    distances = jnp.where(classes.pairs, classes.squared_distances, 1)
    sums = classes.variances[:, None] + classes.variances[None, :]
    return jnp.where(classes.pairs, sums / (2 * distances), 0)
