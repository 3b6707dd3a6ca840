"""The geometry that class means and classifier collapse to, the simplex equiangular tight frame (NC2)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.collapse.class_means import AxisName, ClassMeans, class_means, classifier
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.pairs import sum_over_products
from flatjax.core.metric import metric
from flatjax.core.sharding import sum_over_devices
from flatjax.core.units import safe_sqrt
from flatjax.heads import HeadParams, LinearHead


@metric
def equinorm(
    moments: ClassMoments,
    params: HeadParams | None = None,
    *,
    min_count: int = 2,
    ddof: int = 1,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Standard deviation over mean of the norms ‖μ_c − μ_G‖, or, with `params`, of those of the classifier's rows.

    μ_G is the unweighted mean of the class means.

    Args:
        moments: the moments of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`, to measure it instead of the means, over the same
            classes.
        min_count: classes with fewer samples are left out.
        ddof: the variance is over C − ddof.
        axis_name: as for `cdnv`.

    Returns:
        A scalar without a unit, 0 at a simplex. It is NaN if fewer than two classes are left, a sample was bad, or the
        head is not finite.

    Raises:
        TypeError, ValueError: `moments` are no `ClassMoments`, `params` is no head of the classes, or there
            are fewer than 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, equinorm
        >>> feats = jnp.array([[1.0], [1.0], [0.0], [0.0], [-1.0], [-1.0]], jnp.float32)
        >>> moments = ClassMoments.init(3, 1).update(feats, jnp.array([0, 0, 1, 1, 2, 2]))
        >>> print(f"{equinorm(moments):.4f} {equinorm(moments, {'kernel': jnp.ones((1, 3))}):.4f}")
        0.8660 0.0000

    References:
        Papyan, Han, Donoho: *Prevalence of Neural Collapse during the Terminal Phase of Deep Learning Training*, 2020.
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    return classes.defined(norm_variation(rows, classes, ddof), *heads)


@metric
def equiangularity(
    moments: ClassMoments,
    params: HeadParams | None = None,
    *,
    min_count: int = 2,
    tile_size: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Mean over pairs c ≠ c' of |cos(x_c, x_c') + 1/(C − 1)|, with x_c = μ_c − μ_G, or, with `params`, x_c = w_c.

    Args:
        moments: the moments of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`, to measure it instead of the means.
        min_count: classes with fewer samples are left out.
        tile_size: as for `cdnv`.
        axis_name: as for `cdnv`.

    Returns:
        A scalar without a unit, 0 at a simplex. It is NaN if fewer than two classes are left, a sample was bad, a row
        is 0, or the head is not finite.

    Raises:
        TypeError, ValueError: as `equinorm`, whose reference it shares.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, equiangularity
        >>> feats = jnp.array([[1.0], [1.0], [0.5], [0.5], [-1.5], [-1.5]], jnp.float32)
        >>> print(f"{equiangularity(ClassMoments.init(3, 1).update(feats, jnp.array([0, 0, 1, 1, 2, 2]))):.4f}")
        0.8333
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    return classes.defined(cosine_statistics(rows, classes, tile_size)[0], *heads)


@metric
def cosine_std(
    moments: ClassMoments,
    params: HeadParams | None = None,
    *,
    min_count: int = 2,
    tile_size: int | None = None,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Standard deviation over pairs c ≠ c' of cos(μ_c − μ_G, μ_c' − μ_G), or, with `params`, of cos(w_c, w_c').

    The variance is over the number of pairs.

    Args:
        moments: the moments of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`, to measure it instead of the means.
        min_count: classes with fewer samples are left out.
        tile_size: as for `cdnv`.
        axis_name: as for `cdnv`.

    Returns:
        A scalar without a unit, 0 at a simplex. It is NaN if fewer than two classes are left, a sample was bad, a row
        is 0, or the head is not finite.

    Raises:
        TypeError, ValueError: as `equinorm`, whose reference it shares.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, cosine_std
        >>> feats = jnp.array([[1.0], [1.0], [0.5], [0.5], [-1.5], [-1.5]], jnp.float32)
        >>> print(f"{cosine_std(ClassMoments.init(3, 1).update(feats, jnp.array([0, 0, 1, 1, 2, 2]))):.4f}")
        0.9428
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    return classes.defined(cosine_statistics(rows, classes, tile_size)[1], *heads)


@metric
def etf_error(
    moments: ClassMoments, params: HeadParams | None = None, *, min_count: int = 2, axis_name: AxisName = None
) -> Float[Array, ""]:
    """Distance of the Gram matrix of the centred means, or, with `params`, of the head's rows, to that of a simplex.

        ‖M̄ᵀM̄/‖M̄ᵀM̄‖_F − (I − 11ᵀ/C)/√(C − 1)‖_F,    M̄ = [μ_c − μ_G], or, with `params`, [w_c]

    It is not below `etf_floor`.

    Args:
        moments: the moments of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`, to measure it instead of the means.
        min_count: classes with fewer samples are left out.
        axis_name: as for `cdnv`.

    Returns:
        A scalar without a unit, 0 at a simplex. It is NaN if fewer than two classes are left, a sample was bad, or the
        head is not finite. It is infinite or NaN where all means are one, or the head is 0.

    Raises:
        TypeError, ValueError: as `equinorm`, whose reference it shares.

    Notes:
        It is made of products (m, m) or smaller, at O(C·m²).

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, etf_error
        >>> feats = jnp.array([[1.0], [1.0], [0.5], [0.5], [-1.5], [-1.5]], jnp.float32)
        >>> print(f"{etf_error(ClassMoments.init(3, 1).update(feats, jnp.array([0, 0, 1, 1, 2, 2]))):.4f}")
        0.7654
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    return classes.defined(distance_to_etf(rows, classes), *heads)


@metric
def etf_floor(moments: ClassMoments, *, min_count: int = 2, axis_name: AxisName = None) -> Float[Array, ""]:
    """The least `etf_error` that m features allow: √(2 − 2√(m/(C − 1))) where m < C − 1, and 0 elsewhere.

    Args:
        moments: the moments of C classes and m features.
        min_count: classes with fewer samples are left out.
        axis_name: as for `cdnv`.

    Returns:
        A scalar without a unit; NaN if fewer than two classes are left or a sample was bad.

    Raises:
        TypeError, ValueError: as `equinorm`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, etf_floor
        >>> feats = jnp.array([[1.0], [1.0], [0.5], [0.5], [-1.5], [-1.5]], jnp.float32)
        >>> print(f"{etf_floor(ClassMoments.init(3, 1).update(feats, jnp.array([0, 0, 1, 1, 2, 2]))):.4f}")
        0.7654
    """
    classes = class_means(moments, min_count=min_count, axis_name=axis_name)
    return classes.defined(least_distance_to_etf(classes))


def rows_to_measure(
    moments: ClassMoments, params: HeadParams | None, min_count: int, axis_name: AxisName
) -> tuple[ClassMeans, Float[Array, "C m"], tuple[LinearHead, ...]]:
    """The rows of the classifier, if there is one, or else the centred means."""
    classes = class_means(moments, min_count=min_count, axis_name=axis_name)
    if params is None:
        return classes, classes.centred, ()
    head = classifier(params, moments)
    return classes, classes.only_kept(head.weight), (head,)


def norm_variation(rows: Float[Array, "C m"], classes: ClassMeans, ddof: int = 1) -> Float[Array, ""]:
    """Standard deviation over mean of the norms of the kept rows."""
    return variation(row_norms(rows), classes, ddof)


def variation(values: Float[Array, " C"], classes: ClassMeans, ddof: int) -> Float[Array, ""]:
    """Standard deviation over |mean| of the values of the kept classes."""
    mean = classes.total(jnp.where(classes.kept, values, 0)) / classes.count
    squares = classes.total(jnp.where(classes.kept, (values - mean) ** 2, 0))
    return safe_sqrt(squares / (classes.count - ddof)) / jnp.abs(mean)


def cosine_statistics(
    rows: Float[Array, "C m"], classes: ClassMeans, tile_size: int | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean of |cos(x_c, x_c') + 1/(C − 1)| over c ≠ c', and the standard deviation of the cosines."""
    directions = unit_rows(rows, classes)
    of_simplex = -1 / (classes.count - 1)
    mean = mean_cosine(directions, classes)

    def terms(cosines: Array, *_: Any) -> tuple[Array, Array]:
        return jnp.abs(cosines - of_simplex), (cosines - mean) ** 2

    how = {"tile_size": tile_size, "axis_names": classes.axis_names}
    distance, square = sum_over_products(terms, directions, (), classes.kept, **how)
    num_pairs = classes.count * (classes.count - 1) / 2
    return distance / num_pairs, safe_sqrt(square / num_pairs)


def mean_cosine(directions: Float[Array, "C m"], classes: ClassMeans) -> Float[Array, ""]:
    """The mean cosine over c ≠ c' of unit rows: the square of their sum has all pairs in it."""
    num_units = classes.total(jnp.sum(directions**2, axis=1))
    return (jnp.sum(classes.total(directions) ** 2) - num_units) / (classes.count * (classes.count - 1))


def distance_to_etf(rows: Float[Array, "C m"], classes: ClassMeans) -> Float[Array, ""]:
    """‖G/‖G‖ − P/√(C − 1)‖_F for the Gram matrix G of the kept rows, with P = I − 11ᵀ/C.

    G is P G P, made of the rows less their mean, and a part orthogonal to that, of squared norm ‖G‖² − ‖P G P‖². P G P
    has the eigenvalues of the scatter matrix S (m, m) of the rows, and P has C − 1 times 1. So where m ≤ C − 1, the
    square is ‖S/‖G‖ − I/√(C − 1)‖² + (C − 1 − m)/(C − 1). Elsewhere P G P itself is small.
    """
    num_features, count = rows.shape[1], classes.count
    mean = classes.total(classes.only_kept(rows)) / count
    from_mean = classes.only_kept(rows - mean[None, :])
    size = jnp.sqrt(count - 1)

    def distance(matrix: Array, identity: Array, norm: Array) -> Array:
        return jnp.sum((matrix / norm - identity / size) ** 2)

    few, own = _first_kept(from_mean, num_features + 1, classes)
    gram = few @ few.T
    along_mean = classes.total((from_mean @ mean) ** 2)
    square_beyond = count * (2 * along_mean + count * jnp.sum(mean**2) ** 2)
    projection = jnp.diag(own) - own[:, None] * own[None, :] / count
    if len(gram) <= num_features:
        norm = safe_sqrt(jnp.sum(gram**2) + square_beyond)
        square = distance(gram, projection, norm)
    else:
        is_tall = count > num_features
        scatter = sum_over_devices(from_mean.T @ from_mean, classes.axis_names)
        norm = safe_sqrt(jnp.where(is_tall, jnp.sum(scatter**2), jnp.sum(gram**2)) + square_beyond)
        of_scatter = distance(scatter, jnp.eye(num_features, dtype=rows.dtype), norm)
        square = jnp.where(
            is_tall,
            of_scatter + (count - 1 - num_features) / (count - 1),
            distance(gram, projection, norm),
        )
    return safe_sqrt(square + square_beyond / norm**2)


def least_distance_to_etf(classes: ClassMeans) -> Float[Array, ""]:
    """The floor √(2 − 2√(m/(C − 1))), or 0."""
    share = classes.centred.shape[1] / (classes.count - 1)
    return jnp.sqrt(2 - 2 * jnp.sqrt(jnp.minimum(share, 1)))


def unit_rows(rows: Float[Array, "C m"], classes: ClassMeans) -> Float[Array, "C m"]:
    """Directions of the kept rows; a row of zeros has none, and gives NaN."""
    return classes.only_kept(rows / jnp.where(classes.kept, row_norms(rows), 1)[:, None])


def row_norms(rows: Float[Array, "C m"]) -> Float[Array, " C"]:
    """The norms ‖x_c‖ of rows."""
    return safe_sqrt(jnp.sum(rows**2, axis=1))


def _first_kept(
    rows: Float[Array, "C m"], most: int, classes: ClassMeans
) -> tuple[Float[Array, "k m"], Float[Array, " k"]]:
    """The first of the kept rows of all devices, at most so many, and 1 where there is one."""
    kept, names = classes.kept.astype(jnp.int32), classes.axis_names
    num_devices = jax.lax.axis_size(names) if names else 1
    most = min(num_devices * len(kept), most)
    before = jnp.zeros((), jnp.int32)
    if names:
        of_devices = jax.lax.all_gather(jnp.sum(kept, dtype=jnp.int32), names)
        is_before = jnp.arange(num_devices, dtype=jnp.int32) < jax.lax.axis_index(names)
        before = jnp.sum(jnp.where(is_before, of_devices, 0), dtype=jnp.int32)
    places = jnp.where(classes.kept, before + jnp.cumsum(kept, dtype=jnp.int32) - 1, most)
    put = jnp.zeros((most, rows.shape[1]), rows.dtype).at[places].set(rows, mode="drop")
    own = jnp.arange(most, dtype=jnp.int32) < classes.num_kept
    return sum_over_devices(put, names), own.astype(rows.dtype)
