"""Hyperspherical uniformity: how evenly more classes than fit a simplex spread over the sphere (GNC2)."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.collapse.class_means import AxisName, ClassMeans
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.nc2_geometry import mean_cosine, rows_to_measure, unit_rows
from flatjax.collapse.pairs import sum_over_distances
from flatjax.core import results
from flatjax.core.metric import metric
from flatjax.core.units import safe_sqrt
from flatjax.heads import HeadParams


class Uniformity(NamedTuple):
    """Statistics of log 1/‖û_c − û_c'‖ over the pairs of classes."""

    mean: Float[Array, ""]
    variation: Float[Array, ""]
    """The standard deviation over the magnitude of the mean."""

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def gnc2(
    moments: ClassMoments,
    params: HeadParams | None = None,
    *,
    min_count: int = 2,
    tile_size: int | None = None,
    axis_name: AxisName = None,
) -> Uniformity:
    """Mean and variation over pairs c ≠ c' of log 1/‖û_c − û_c'‖, û the directions of μ_c − μ_G, or of w_c.

    The variation is the standard deviation, over the number of pairs, divided by the magnitude of the mean. It makes
    little sense where distances are about 1, as the logarithm is then about 0.

    Args:
        moments: the moments of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`, to measure the classifier instead of the means.
        min_count: classes with fewer samples are left out.
        tile_size: as for `cdnv`.
        axis_name: as for `cdnv`.

    Returns:
        A `Uniformity` of scalars. They are infinite or NaN where two directions are one or no further apart than
        rounding. They are NaN if fewer than two classes are left, a sample was bad, or the head is not finite.

    Raises:
        TypeError, ValueError: as `equinorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, gnc2
        >>> feats = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]], jnp.float32)
        >>> moments = ClassMoments.init(3, 2).update(feats, jnp.array([0, 0, 1, 1, 2, 2]))
        >>> print("{:.4f} {:.4f}".format(*gnc2(moments)))
        -0.5361 0.1376

    References:
        Wu, Papyan: *Linguistic Collapse: Neural Collapse in (Large) Language Models*, 2024.
        Liu et al.: *Generalizing and Decoupling Neural Collapse via Hyperspherical Uniformity Gap*, 2023.
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    return classes.defined(log_distances(rows, classes, tile_size), *heads)


_ROUNDINGS = 16
"""The rounding of a distance between directions, in units of ε."""


def log_distances(rows: Float[Array, "C m"], classes: ClassMeans, tile_size: int | None = None) -> Uniformity:
    """The `Uniformity` of log 1/‖û_c − û_c'‖ over the pairs of kept rows."""
    directions = unit_rows(rows, classes)
    # Near the mean to be found, so that the squares from there nearly are the variance.
    near = -jnp.log(2 - 2 * mean_cosine(directions, classes)) / 2

    # Directions closer than they are rounded are not told apart: of means that are far from all, say.
    rounding = (_ROUNDINGS * float(jnp.finfo(rows.dtype).eps)) ** 2

    def terms(distances: Array, *_: Any) -> tuple[Array, Array]:
        distances = jnp.where((distances > 0) & (distances < rounding), jnp.nan, distances)
        offsets = -jnp.log(distances) / 2 - near
        return offsets, offsets**2

    how = {"tile_size": tile_size, "axis_names": classes.axis_names}
    num_pairs = classes.count * (classes.count - 1) / 2
    offset, square = (x / num_pairs for x in sum_over_distances(terms, directions, (), classes.kept, **how))
    variance = jnp.maximum(square - offset**2, 0)
    return Uniformity(near + offset, safe_sqrt(variance) / jnp.abs(near + offset))
