"""What neural collapse is measured on: the class means, and what is left of the samples around them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer

from flatjax.pairwise import squared_distances
from flatjax.samples import Samples


class ClassMeans(NamedTuple):
    """Statistics of n samples in C classes; a class that is not kept has zeros, and its samples the share 0."""

    kept: Bool[Array, " C"]
    """Classes of two samples or more: one sample is its own mean, and says nothing of the spread around it."""
    num_empty: Int[Array, ""]
    num_single: Int[Array, ""]
    centred: Float[Array, "C m"]
    """μ_c − μ_G, with μ_G the unweighted mean of the kept means, in units of the largest number in it."""
    squared_distances: Float[Array, "C C"]
    """‖μ_c − μ_c'‖², in the same units squared."""
    labels: Integer[Array, " n"]
    variances: Float[Array, " C"]
    """V_c, the mean squared distance of a class to its mean, in the same units squared."""
    residuals: Float[Array, "n m"]
    """h_i − μ_c(i), in the same units."""
    shares: Float[Array, " n"]
    """Of the kept samples: they sum to 1."""

    @property
    def num_kept(self) -> Int[Array, ""]:
        return jnp.sum(self.kept)

    @property
    def pairs(self) -> Bool[Array, "C C"]:
        """The ordered pairs of different kept classes."""
        return self.kept[:, None] & self.kept[None, :] & ~jnp.eye(len(self.kept), dtype=bool)


def class_means(samples: Samples, num_classes: int) -> ClassMeans:
    """Centres first and squares second: no E[x²] − E[x]²."""
    feats, labels = samples.feats, samples.labels

    def per_class(values: Array) -> Array:
        return jax.ops.segment_sum(values, labels, num_classes)

    counts = per_class(samples.counts.astype(jnp.int32))
    kept = counts >= 2
    # Weights, not shares: their sums are exact if they are 1, where many n-ths would round the same way every time.
    weights = jnp.where(kept[labels], samples.weights, 0)
    masses = per_class(weights)[:, None]
    masses = jnp.where(masses == 0, 1, masses)

    def around(means: Float[Array, "C m"]) -> tuple[Float[Array, "n m"], Float[Array, "C m"]]:
        """The samples from their class's mean, and what that mean lacks."""
        residuals = feats - means[labels]
        return residuals, per_class(weights[:, None] * residuals) / masses

    # A mean is rounded to ε times its size, which may exceed both the spread around it and the way to the next. So μ_c
    # is two numbers: `means`, as near as rounding allows, and `remainders`, which count once the size is subtracted.
    # The samples themselves are not moved first: near 0 they may be finer than where they would be moved to.
    means = per_class(weights[:, None] * feats) / masses
    means = means + around(means)[1]
    residuals, remainders = around(means)
    residuals = jnp.where(kept[labels][:, None], residuals - remainders[labels], 0)
    # From one of the means first: if all are one, exactly 0 remains.
    centred = jnp.where(kept[:, None], means - means[jnp.argmax(kept)][None, :] + remainders, 0)
    grand_mean = jnp.sum(centred, axis=0, keepdims=True) / jnp.sum(kept).astype(feats.dtype)
    centred = jnp.where(kept[:, None], centred - grand_mean, 0)

    # No metric knows the unit of the features, and their squares must not overflow.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(centred)))
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    centred, residuals = centred / unit, residuals / unit
    return ClassMeans(
        kept=kept,
        num_empty=jnp.sum(counts == 0),
        num_single=jnp.sum(counts == 1),
        centred=centred,
        squared_distances=squared_distances(centred),
        labels=labels,
        variances=per_class(weights * jnp.sum(residuals**2, axis=1)) / masses[:, 0],
        residuals=residuals,
        shares=weights / jnp.sum(weights),
    )
