"""The class means that collapse is a geometry of: the classes with enough samples, centred, in a unit of their own."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flatjax.collapse.moments import ClassMoments, check_moments
from flatjax.heads import HeadParams, LinearHead, linear_head
from flatjax.integers import whole_number
from flatjax.sharding import axis_names, sum_over_devices

AxisName = str | tuple[str, ...] | None
"""Of a `jax.shard_map`, along which the classes are split."""


@dataclasses.dataclass(frozen=True)
class ClassMeans:
    """Of C classes, or of a device's share of them; of a class that is not kept, zeros."""

    kept: Bool[Array, " C"]
    centred: Float[Array, "C m"]
    """μ_c − μ_G, with μ_G the unweighted mean of the kept means, in units of the largest number in it."""
    variances: Float[Array, " C"]
    """V_c, the mean squared distance of a class to its mean, in the same units squared."""
    unit: Float[Array, ""]
    axis_names: tuple[str, ...]

    @property
    def num_kept(self) -> Int[Array, ""]:
        return self.total(self.kept.astype(jnp.int32))

    @property
    def count(self) -> Float[Array, ""]:
        """C, of the classes kept."""
        return self.num_kept.astype(self.centred.dtype)

    def total(self, values: Array) -> Array:
        """Σ over the classes of all devices."""
        return sum_over_devices(jnp.sum(values, axis=0, dtype=values.dtype), self.axis_names)

    def only_kept(self, rows: Float[Array, "C m"]) -> Float[Array, "C m"]:
        return jnp.where(self.kept[:, None], rows, 0)

    def defined(self, value: Float[Array, ""], *heads: LinearHead) -> Float[Array, ""]:
        """NaN where there are no two classes, samples were bad, or a head is not finite."""
        defined = (self.num_kept >= 2) & ~jnp.isnan(self.unit)
        for head in heads:
            num_bad = self.total(jnp.atleast_1d((~head.is_finite).astype(jnp.int32)))
            defined &= num_bad == 0
        return jnp.where(defined, value, jnp.nan)


def class_means(moments: ClassMoments, *, min_count: int = 2, ddof: int = 0, axis_name: AxisName = None) -> ClassMeans:
    """Of the classes that have at least `min_count` samples.

    Raises:
        TypeError: no `ClassMoments`.
        ValueError: fewer than 2 classes, or a `min_count` that `ddof` leaves no freedom.
    """
    check_moments(moments)
    names = axis_names(axis_name)
    num_classes = moments.num_classes * (jax.lax.axis_size(names) if names else 1)
    if num_classes < 2:
        raise ValueError(f"the moments are of {num_classes} class; there is nothing between fewer than 2")
    min_count, ddof = whole_number(min_count, "min_count"), whole_number(ddof, "ddof")
    if min_count <= ddof or min_count < 1:
        raise ValueError(f"min_count is {min_count} and ddof {ddof}, wanted min_count at least 1, and more than ddof")
    kept = moments.kept(min_count)
    column = kept[:, None]
    num_kept = sum_over_devices(jnp.sum(kept, dtype=jnp.int32), names).astype(moments.dtype)

    # From one of the means first: if all are one, exactly 0 remains.
    centres = moments.centres
    from_one = jnp.where(column, centres.high - _first(centres.high, kept, names)[None, :] + centres.low, 0)
    grand_mean = _sum_of_rows(kept, from_one, names) / num_kept
    centred = jnp.where(column, from_one - grand_mean[None, :], 0)

    # No metric knows the unit of the features, and their squares must not overflow.
    # The largest number in `centred`, without a second array (C, m): a row that is not kept is as that one mean.
    highest, lowest = jnp.max(from_one, axis=0) - grand_mean, grand_mean - jnp.min(from_one, axis=0)
    size = jax.lax.stop_gradient(jnp.max(jnp.maximum(highest, lowest)))
    size = jax.lax.pmax(size, names) if names else size
    num_bad = jax.lax.pmax(moments.num_bad, names) if names else moments.num_bad
    unit = jnp.where(num_bad > 0, jnp.nan, jnp.where((size > 0) & jnp.isfinite(size), size, 1))
    freedom = moments.counts.astype(moments.dtype)
    variances = moments.variances * (freedom / jnp.where(kept, freedom - ddof, 1) if ddof else 1)
    return ClassMeans(kept, centred / unit, jnp.where(kept, variances / unit / unit, 0), unit, names)


def classifier(params: HeadParams, moments: ClassMoments) -> LinearHead:
    """Of as many outputs as classes.

    Raises:
        ValueError: it has another number of outputs or of features than the moments.
    """
    head = linear_head(params)
    if (head.num_outputs, head.num_features) != (moments.num_classes, moments.num_features):
        raise ValueError(
            f"the head has {head.num_outputs} outputs of {head.num_features} features, but the moments are of "
            f"{moments.num_classes} classes and {moments.num_features} features"
        )
    return head.astype(moments.dtype)


def _first(rows: Float[Array, "C m"], kept: Bool[Array, " C"], names: tuple[str, ...]) -> Float[Array, " m"]:
    """One of the kept rows, the same on all devices."""
    # Summed, not sliced: of rows split among devices a slice is cut once all are gathered.
    chosen = kept & (jnp.arange(len(kept)) == jnp.argmax(kept))
    if names:
        device = jax.lax.axis_index(names)
        chosen &= device == jax.lax.pmin(jnp.where(jnp.any(kept), device, jnp.iinfo(jnp.int32).max), names)
    return _sum_of_rows(chosen, rows, names)


def _sum_of_rows(chosen: Bool[Array, " C"], rows: Float[Array, "C m"], names: tuple[str, ...]) -> Float[Array, " m"]:
    """As a product, which needs no copy of the rows; moments hold finite numbers alone."""
    return sum_over_devices(jnp.matmul(chosen.astype(rows.dtype), rows, precision="highest"), names)
