"""Class means, the points whose geometry collapse is.

Of classes with enough samples, centred, in a unit of their own.
"""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flatjax.collapse.moments import ClassMoments, check_moments
from flatjax.core.double_word import Double
from flatjax.core.integers import whole_number
from flatjax.core.sharding import axis_names, sum_over_devices
from flatjax.core.units import unit_near
from flatjax.heads import HeadParams, LinearHead, linear_head

T = TypeVar("T")
AxisName = str | tuple[str, ...] | None
"""Names of axes of a `jax.shard_map`, along which the classes are split."""


@dataclasses.dataclass(frozen=True)
class ClassMeans:
    """The means of C classes, or of a device's share of them; a class that is not kept has zeros."""

    kept: Bool[Array, " C"]
    placed: Float[Array, "C m"]
    """The means μ_c less one of them, near the most of them, in units of the largest number in μ_c − μ_G."""
    middle: Float[Array, " m"]
    """The unweighted mean μ_G of the kept means, less the same one."""
    variances: Float[Array, " C"]
    """The mean squared distance V_c of a class to its mean, in the same units squared."""
    unit: Float[Array, ""]
    axis_names: tuple[str, ...]

    @property
    def centred(self) -> Float[Array, "C m"]:
        """The centred means μ_c − μ_G. A mean that is far off moves μ_G.

        How others differ then has digits of that distance only.
        """
        return self.only_kept(self.placed - self.middle[None, :])

    @property
    def num_kept(self) -> Int[Array, ""]:
        return self.total(self.kept.astype(jnp.int32))

    @property
    def count(self) -> Float[Array, ""]:
        """The number C of classes kept, in the dtype of the means."""
        return self.num_kept.astype(self.centred.dtype)

    @property
    def differ(self) -> Bool[Array, ""]:
        """Whether the means are not all one."""
        return self.total(jnp.any(self.placed != 0, axis=1).astype(jnp.int32)) > 0

    def total(self, values: Array) -> Array:
        """The sum Σ over the classes of all devices."""
        return sum_over_devices(jnp.sum(values, axis=0, dtype=values.dtype), self.axis_names)

    def only_kept(self, rows: Float[Array, "C m"]) -> Float[Array, "C m"]:
        return jnp.where(self.kept[:, None], rows, 0)

    def defined(self, values: T, *heads: LinearHead) -> T:
        """The values, or NaN where there are no two classes, samples were bad, or a head is not finite."""
        defined = (self.num_kept >= 2) & ~jnp.isnan(self.unit)
        for head in heads:
            num_bad = self.total(jnp.atleast_1d((~head.is_finite).astype(jnp.int32)))
            defined &= num_bad == 0
        return jax.tree.map(lambda value: jnp.where(defined, value, jnp.nan), values)


def class_means(moments: ClassMoments, *, min_count: int = 2, ddof: int = 0, axis_name: AxisName = None) -> ClassMeans:
    """Reads the means of the classes that have at least `min_count` samples.

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

    # From one of the means: if all are one, exactly 0 remains.
    origin = _row(moments.centres, _near_the_most(moments.centres, kept, names), names)
    placed = jnp.where(column, moments.centres.minus(origin), 0)
    middle = _sum_of_rows(kept, placed, names) / num_kept

    # No metric knows the unit of the features, and their squares must not overflow.
    # The largest number in μ_c − μ_G, without a second array (C, m): a row that is not kept is as that one mean.
    highest, lowest = jnp.max(placed, axis=0) - middle, middle - jnp.min(placed, axis=0)
    size = jax.lax.stop_gradient(jnp.max(jnp.maximum(highest, lowest)))
    size = jax.lax.pmax(size, names) if names else size
    num_bad = jax.lax.pmax(moments.num_bad, names) if names else moments.num_bad
    unit = jnp.where(num_bad > 0, jnp.nan, jnp.where(jnp.isfinite(size), unit_near(size), 1))
    freedom = moments.counts.astype(moments.dtype)
    variances = moments.variances * (freedom / jnp.where(kept, freedom - ddof, 1) if ddof else 1)
    variances = jnp.where(kept, variances / unit / unit, 0)
    return ClassMeans(kept, placed / unit, middle / unit, variances, unit, names)


def classifier(params: HeadParams, moments: ClassMoments) -> LinearHead:
    """Reads a head that must have as many outputs as there are classes.

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


def _near_the_most(centres: Double, kept: Bool[Array, " C"], names: tuple[str, ...]) -> Bool[Array, " C"]:
    """Finds one of the kept means of all devices that is near at least half of them.

    Whatever mean distances are measured from, the middle one of them is that of such a mean. They are measured from the
    smallest, as features have more digits the smaller they are.
    """
    centres = jax.lax.stop_gradient(centres)
    smallest = _row(centres, _place(jnp.max(jnp.abs(centres.high), axis=1), kept, names, 0), names)
    distances = jnp.max(jnp.abs(centres.minus(smallest)), axis=1)
    num_kept = sum_over_devices(jnp.sum(kept, dtype=jnp.int32), names)
    return _place(distances, kept, names, jnp.maximum(num_kept - 1, 0) // 2)


def _place(
    sizes: Float[Array, " C"], kept: Bool[Array, " C"], names: tuple[str, ...], rank: Int[Array, ""] | int
) -> Bool[Array, " C"]:
    """Marks which of the kept classes of all devices has the size of so high a rank."""
    sizes = jnp.where(kept, sizes, jnp.inf)
    of_all = jax.lax.all_gather(sizes, names, tiled=True) if names else sizes
    own = jax.lax.axis_index(names) * len(kept) if names else 0
    return own + jnp.arange(len(kept), dtype=jnp.int32) == jnp.argsort(of_all)[rank].astype(jnp.int32)


def _row(centres: Double, chosen: Bool[Array, " C"], names: tuple[str, ...]) -> Double:
    # Summed, not sliced: of rows split among devices a slice is cut once all are gathered.
    return Double(*(_sum_of_rows(chosen, rows, names)[None, :] for rows in centres))


def _sum_of_rows(chosen: Bool[Array, " C"], rows: Float[Array, "C m"], names: tuple[str, ...]) -> Float[Array, " m"]:
    """Sums the chosen rows as a product, which needs no copy of the rows; moments hold only finite numbers."""
    return sum_over_devices(jnp.matmul(chosen.astype(rows.dtype), rows, precision="highest"), names)
