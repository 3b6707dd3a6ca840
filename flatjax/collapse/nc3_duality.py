"""Duality: how far the classifier's rows are the class means (NC3), or all as far from them (UNC3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.collapse.class_means import AxisName, ClassMeans
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.nc2_geometry import rows_to_measure, unit_rows, variation
from flatjax.core.metric import metric
from flatjax.core.units import safe_sqrt
from flatjax.heads import HeadParams


@metric
def nc3(
    moments: ClassMoments,
    params: HeadParams,
    *,
    min_count: int = 2,
    squared: bool = True,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """NC3 = ‖W/‖W‖_F − M̄ᵀ/‖M̄‖_F‖_F², with M̄ = [μ_c − μ_G], from 0, self-duality, to 4.

    Args:
        moments: of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`; the bias has no part.
        min_count: classes with fewer samples are left out of both.
        squared: False for the norm itself.
        axis_name: as for `cdnv`; the head is then split as the classes are.

    Returns:
        A scalar without a unit. It is NaN as `cdnv` is, where the head is 0 or not finite, and where all means are one.

    Raises:
        TypeError, ValueError: `params` is no head of the classes, or there are fewer than 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, nc3
        >>> feats = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], jnp.float32)
        >>> moments = ClassMoments.init(2, 2).update(feats, jnp.array([0, 0, 1, 1]))
        >>> params = {"kernel": jnp.array([[1.0, -1.0], [1.0, -1.0]])}
        >>> print(f"{nc3(moments, params):.4f} {nc3(moments, params, squared=False):.4f}")
        0.5858 0.7654

    References:
        Papyan, Han, Donoho: *Prevalence of Neural Collapse during the Terminal Phase of Deep Learning Training*, 2020.
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    square = self_duality(rows, classes)
    return classes.defined(square if squared else safe_sqrt(square), *heads)


@metric
def unc3(
    moments: ClassMoments,
    params: HeadParams,
    *,
    min_count: int = 2,
    ddof: int = 0,
    axis_name: AxisName = None,
) -> Float[Array, ""]:
    """Uniform duality: the standard deviation over the magnitude of the mean, over c, of cos(w_c, μ_c − μ_G).

    Args:
        moments: the moments of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`; the bias has no part.
        min_count: classes with fewer samples are left out of both.
        ddof: the variance is over C − ddof.
        axis_name: as for `cdnv`; the head is then split as the classes are.

    Returns:
        A scalar without a unit, 0 where all classes are as near to duality. It is NaN as `cdnv` is, where a row of the
        head is 0 or not finite, and where all means are one.

    Raises:
        TypeError, ValueError: `params` is no head of the classes, or there are fewer than 2.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, unc3
        >>> feats = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]], jnp.float32)
        >>> moments = ClassMoments.init(2, 2).update(feats, jnp.array([0, 0, 1, 1]))
        >>> print(f"{unc3(moments, {'kernel': jnp.array([[1.0, -1.0], [1.0, 0.0]])}):.4f}")
        0.1716

    References:
        Wu, Papyan: *Linguistic Collapse: Neural Collapse in (Large) Language Models*, 2024.
    """
    classes, rows, heads = rows_to_measure(moments, params, min_count, axis_name)
    return classes.defined(duality_variation(rows, classes, ddof), *heads)


def self_duality(rows: Float[Array, "C m"], classes: ClassMeans) -> Float[Array, ""]:
    """The distance ‖W/‖W‖_F − M̄ᵀ/‖M̄‖_F‖_F² of the kept rows."""

    def unit(matrix: Array) -> Array:
        return matrix / safe_sqrt(classes.total(jnp.sum(matrix**2, axis=1)))

    return classes.total(jnp.sum((unit(rows) - unit(classes.centred)) ** 2, axis=1))


def duality_variation(rows: Float[Array, "C m"], classes: ClassMeans, ddof: int = 0) -> Float[Array, ""]:
    """Standard deviation over |mean| of the cosines of the kept rows with their means."""
    cosines = jnp.sum(unit_rows(rows, classes) * unit_rows(classes.centred, classes), axis=1)
    return variation(cosines, classes, ddof)
