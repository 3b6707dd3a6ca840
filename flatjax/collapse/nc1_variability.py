"""Variability collapse: how wide the classes are against how far they lie apart (NC1, CDNV, NCC)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from flatjax.collapse.class_means import AxisName, ClassMeans, class_means
from flatjax.collapse.inverses import Inverse, Rows, inverse_of_gram, of_all_devices, pseudo_inverse
from flatjax.collapse.moments import ClassMoments, check_moments
from flatjax.collapse.pairs import sum_over_distances
from flatjax.core.metric import metric
from flatjax.core.units import root_of_squares


@metric
def cdnv(
    moments: ClassMoments,
    *,
    min_count: int = 2,
    ddof: int = 0,
    tile_size: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Class-distance normalized variance: the mean over pairs c ≠ c' of (V_c + V_c')/(2‖μ_c − μ_c'‖²).

    μ_c is the mean of class c and V_c the mean squared distance to it. The distance is squared: one published code has
    its fourth power.

    Args:
        moments: the moments of C classes and m features.
        min_count: classes with fewer samples are left out; a class of one sample has no spread.
        ddof: 1 for variances over n − 1 samples, by their number whatever their weights.
        tile_size: t, how many classes are compared at a time, static. It changes nothing beyond rounding.
        axis_name: inside a `jax.shard_map`, the axes along which the classes are split, equally many on each device.
            Where the compiler splits the work, nothing need be said.

    Returns:
        A scalar without a unit, 0 where the classes have collapsed to their means. It is NaN if fewer than two classes
        are left or a sample was bad. It is infinite, or NaN, where two means are one.

    Raises:
        TypeError: `moments` are no `ClassMoments`.
        ValueError: fewer than 2 classes, or a `min_count` that is not more than `ddof`.

    Notes:
        The cost is half a product of matrices (C, m)·(m, C), and the memory O((C + t)·m + t²).

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, cdnv
        >>> feats = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], jnp.float32)
        >>> moments = ClassMoments.init(2, 2).update(feats, jnp.array([0, 0, 1, 1]))
        >>> print(f"{cdnv(moments):.4f} {cdnv(moments, ddof=1):.4f}")
        0.0025 0.0050

    References:
        Galanti, György, Hutter: *On the Role of Neural Collapse in Transfer Learning*, 2022.
    """
    classes = class_means(moments, min_count=min_count, ddof=ddof, axis_name=axis_name)
    return classes.defined(sum_of_cdnv(classes, tile_size) / (classes.count * (classes.count - 1)))


@metric
def ncc(
    moments: ClassMoments,
    *,
    min_count: int = 2,
    ddof: int = 0,
    tile_size: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """CDNV summed over the ordered pairs c ≠ c', so C(C − 1) times as large: a λ does not carry over.

    The accuracy of the nearest class centre goes by the same letters, and is something else.

    Args, Returns and Raises:
        The same as for `cdnv`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, ncc
        >>> feats = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], jnp.float32)
        >>> print(f"{ncc(ClassMoments.init(2, 2).update(feats, jnp.array([0, 0, 1, 1]))):.4f}")
        0.0050

    References:
        Han, Kamp: *Flattening the Path to Generalization in LLMs*, a talk.
    """
    classes = class_means(moments, min_count=min_count, ddof=ddof, axis_name=axis_name)
    return classes.defined(sum_of_cdnv(classes, tile_size))


@metric
def nc1(
    moments: ClassMoments, *, min_count: int = 2, divided: bool = True, axis_name: AxisName = None
) -> Float[Array, ""]:
    """NC1 = tr(Σ_W Σ_B⁺)/C, with Σ_B = M̄M̄ᵀ/C and M̄ = [μ_c − μ_G], μ_G the unweighted mean of the class means.

    Σ_W is the covariance within the classes over all samples. `ClassMoments.init(..., covariance=True)` keeps it.

    Args:
        moments: the moments of C classes and m features, with the covariance.
        min_count: classes with fewer samples are left out. It must be 1 or 2, as the covariance is of all samples: one
            sample that is its own mean adds nothing to it.
        divided: False for tr(Σ_W Σ_B⁺), as the notebook of Papyan, Han and Donoho plots it.
        axis_name: as for `cdnv`; the covariance is then the whole on every device.

    Returns:
        A scalar without a unit, 0 where the classes have collapsed to their means. It is NaN if fewer than two classes
        are left, a sample was bad, all means are one, or rounding of up to half of the means, which are far off, hides
        how the others differ.

    Notes:
        Directions in which the means differ by less than about 8 ε of their size are taken for none. Where more than
        half of the means are far off, by 1e5 or more times the distances of the others, float32 may keep nothing of
        those distances, and NC1 is too small without a warning. Moments in float64 keep them.

    Raises:
        TypeError: `moments` are no `ClassMoments`.
        ValueError: the moments have no covariance, or `min_count` is neither 1 nor 2.

    Notes:
        A few means that are 10⁹ times further than the others do not hide how these differ. Inverting Σ_B magnifies
        what Σ_W is rounded by. Where the spread is much smaller along the weak directions of the means than along
        others, `neural_collapse`, which has the samples, keeps more digits.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, nc1
        >>> feats = jnp.array([[1.1, 0.0], [0.9, 0.0], [-1.1, 0.0], [-0.9, 0.0]], jnp.float32)
        >>> moments = ClassMoments.init(2, 2, covariance=True).update(feats, jnp.array([0, 0, 1, 1]))
        >>> print(f"{nc1(moments):.4f} {nc1(moments, divided=False):.4f}")
        0.0050 0.0100

    References:
        Papyan, Han, Donoho: *Prevalence of Neural Collapse during the Terminal Phase of Deep Learning Training*, 2020.
    """
    check_moments(moments)
    if moments.product_sums is None:
        raise ValueError(
            "NC1 needs the covariance within the classes: ClassMoments.init(..., covariance=True) keeps it"
        )
    if min_count not in (1, 2):
        raise ValueError(f"min_count is {min_count}, but the covariance is of all samples: wanted 1 or 2")
    classes = class_means(moments, min_count=min_count, axis_name=axis_name)
    value, _ = square_within_means(moments, classes)
    return classes.defined(value if divided else classes.count * value)


def square_within_means(moments: ClassMoments, classes: ClassMeans) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """NC1 from the covariance, and the number of directions in which the means are told apart."""
    assert moments.product_sums is not None
    mass = classes.total(jnp.where(classes.kept, moments.masses, 0))
    within = moments.product_sums.value / mass / classes.unit / classes.unit
    rows = contrasts(classes)
    if len(rows.values) > 2 * rows.values.shape[1] or classes.axis_names:
        inverse = inverse_of_gram(classes.axis_names, rows)
    else:
        inverse = pseudo_inverse(rows)
        inverse = inverse._replace(matrix=inverse.matrix @ inverse.matrix.T)
    products = within * inverse.matrix
    value, size = jnp.sum(products), jax.lax.stop_gradient(jnp.sum(jnp.abs(products)))
    is_rounding = 8 * float(jnp.finfo(value.dtype).eps) * size > 0.1 * jnp.abs(value)
    return _where_means_differ(jnp.where(is_rounding & (size > 0), jnp.nan, value), inverse, classes)


def sum_of_cdnv(classes: ClassMeans, tile_size: int | None = None) -> Float[Array, ""]:
    """Σ over ordered pairs of different kept classes of (V_c + V_c')/(2‖μ_c − μ_c'‖²)."""

    def term(distances: Array, v: Array, other: Array) -> Array:
        return (v[:, None] + other[None, :]) / distances

    return sum_over_distances(
        term, classes.placed, classes.variances, classes.kept, tile_size=tile_size, axis_names=classes.axis_names
    )


def mean_square_in_means(
    residuals: Float[Array, "n m"], shares: Float[Array, " n"], classes: ClassMeans
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """NC1 from the samples themselves, E‖M̄⁺(h − μ_c)‖², and the number of directions the means are told apart in."""
    inverse = pseudo_inverse(contrasts(classes))
    return _where_means_differ(jnp.sum(shares * jnp.sum((residuals @ inverse.matrix) ** 2, axis=1)), inverse, classes)


def _where_means_differ(
    value: Float[Array, ""], inverse: Inverse, classes: ClassMeans
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The value, or NaN where all means are one, or where rounding hides how they differ.

    Σ_B⁺ = 0 would call means that are all one collapsed.
    """
    return jnp.where(classes.differ, inverse.known * value, jnp.nan), inverse.rank.astype(jnp.int32)


def contrasts(classes: ClassMeans) -> Rows:
    """Rows X with XᵀX = M̄M̄ᵀ, each to rounding of the means that it is made of.

    Each mean is taken against that of those before it (Helmert), near ones first, and far ones among themselves before
    they are held against others: a difference of means that are far off has only digits of that distance. If classes
    are split among devices, each device has its own contrasts, and the first of them also those between devices.
    """
    names, masses = classes.axis_names, classes.kept.astype(classes.placed.dtype)
    sizes = root_of_squares(jax.lax.stop_gradient(classes.placed).T)
    # The largest are about 1, and each level is of those 2¹⁶ times as large as of the one before.
    levels = jnp.where(sizes == 0, 0, jnp.clip(_LEVELS - 1 + jnp.frexp(sizes)[1] // 16, 0, _LEVELS - 1))
    own, groups = _contrasts(_Groups(classes.placed, sizes, masses), levels, _LEVELS)
    between = []
    if names:
        groups = jax.tree.map(lambda x: of_all_devices(x, names), groups)
        of_devices = jnp.tile(jnp.arange(_LEVELS, dtype=levels.dtype), jax.lax.axis_size(names))
        rows, groups = _contrasts(groups, of_devices, _LEVELS)
        between.append(rows)
    between.append(_contrasts(groups, jnp.zeros(_LEVELS, levels.dtype), 1)[0])
    if names:
        is_first = jax.lax.axis_index(names) == 0
        between = jax.tree.map(lambda x: jnp.where(is_first, x, 0), between)
    values, sizes = (jnp.concatenate(parts) for parts in zip(own, *between, strict=True))
    return Rows.of(values, sizes)


_LEVELS = 8
"""The number of levels of sizes, over 128 powers of 2."""


class _Groups(NamedTuple):
    """The means of groups of classes."""

    means: Float[Array, "k m"]
    sizes: Float[Array, " k"]
    masses: Float[Array, " k"]


def _contrasts(
    groups: _Groups, levels: Integer[Array, " k"], num_levels: int
) -> tuple[tuple[Float[Array, "k m"], Float[Array, " k"]], _Groups]:
    """Contrasts X and the sizes of their rows, with XᵀX = Σ mass (row − mean)(row − mean)ᵀ summed over levels.

    And each level.
    """
    # What has no mass comes last, at a level that there is not.
    levels = jnp.where(groups.masses == 0, num_levels, levels)
    order = jnp.lexsort((groups.sizes, levels))
    means, sizes, masses = (x[order] for x in groups)
    levels = levels[order]
    # Counted, which is a smaller program than a search, for the few levels that there are.
    of_each = jnp.arange(num_levels, dtype=levels.dtype)[:, None]
    firsts = jnp.sum(levels[None, :] < of_each, axis=1, dtype=jnp.int32).clip(max=len(levels) - 1)
    lasts = jnp.sum(levels[None, :] <= of_each, axis=1, dtype=jnp.int32) - 1

    # From the first of a level: what is rounded then is of the size of the differences.
    origins = means[firsts]
    offsets = jnp.where((masses == 0)[:, None], 0, means - _taken(origins, levels))
    # Masses, and the sums of offsets, over what comes before each in its level, and over all of a level.
    weighted = jnp.concatenate([masses[:, None], masses[:, None] * offsets], axis=1)
    sums = jnp.cumsum(weighted, axis=0) - weighted
    before = sums - _taken(sums[firsts], levels)
    total = jax.ops.segment_sum(weighted, levels, num_levels)

    # Masses have no derivative, and the root of 0 must have none.
    count, of_level = jax.lax.stop_gradient((before[:, 0], total[:, 0]))
    distances = offsets - before[:, 1:] / jnp.where(count == 0, 1, count)[:, None]
    weights = jnp.sqrt(count * masses / jnp.where(masses == 0, 1, count + masses))
    is_empty = of_level == 0
    joint = total[:, 1:] / jnp.where(is_empty, 1, of_level)[:, None]
    joint = jnp.where(is_empty[:, None], 0, origins + joint)
    largest = jnp.where(is_empty, 0, sizes[lasts])
    return (weights[:, None] * distances, sizes), _Groups(joint, largest, of_level)


def _taken(of_levels: Array, levels: Integer[Array, " k"]) -> Array:
    return of_levels[levels.clip(max=len(of_levels) - 1)]
