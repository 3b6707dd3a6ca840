"""Variability collapse: how wide the classes are against how far they lie apart (NC1, CDNV, NCC)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.collapse.class_means import AxisName, ClassMeans, class_means
from flatjax.collapse.moments import ClassMoments, check_moments
from flatjax.collapse.pairs import sum_over_distances
from flatjax.metric import metric
from flatjax.sharding import sum_over_devices


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

    With μ_c the mean of class c and V_c the mean squared distance to it. The distance is squared: one published code
    has its fourth power. At the cost of half a product of matrices (C, m)·(m, C), and a memory of O((C + t)·m + t²).

    Args:
        moments: of C classes and m features.
        min_count: classes with fewer samples are left out, and of one sample has no spread.
        ddof: 1 for variances over n − 1 samples, by their number whatever their weights.
        tile_size: t, of classes, static. Changes nothing beyond rounding.
        axis_name: inside a `jax.shard_map`, the axes along which the classes are split, equally many on each device.
            Where the compiler splits the work, nothing need be said.

    Returns:
        A scalar without a unit. NaN if fewer than two classes are left or a sample was bad; infinite, or NaN, where two
        means are one.

    Raises:
        TypeError: `moments` are no `ClassMoments`.
        ValueError: fewer than 2 classes, or a `min_count` that is not more than `ddof`.

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

    Not to be taken for the accuracy of the nearest class centre, which goes by the same letters.

    Args and Raises:
        As for `cdnv`.

    Returns:
        As `cdnv`.

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

    Σ_W, the covariance within the classes over all samples, is what `ClassMoments.init(..., covariance=True)` keeps.
    Inverting Σ_B magnifies what Σ_W is rounded by: where the spread is much smaller along the weak directions of the
    means than along others, `neural_collapse`, which has the samples, keeps more digits.

    Args:
        moments: of C classes and m features, with the covariance.
        min_count: classes with fewer samples are left out; 1 or 2, as the covariance is of all samples, to which one
            sample that is its own mean adds nothing.
        divided: False for tr(Σ_W Σ_B⁺), as the notebook of Papyan, Han and Donoho plots it.
        axis_name: as for `cdnv`; the covariance is then the whole on every device.

    Returns:
        A scalar without a unit; NaN as `cdnv`, and where all means are one.

    Raises:
        TypeError: `moments` are no `ClassMoments`.
        ValueError: the moments have no covariance, or `min_count` is neither 1 nor 2.

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
    mass = classes.total(jnp.where(classes.kept, moments.masses, 0))
    within = moments.product_sums.value / mass / classes.unit / classes.unit
    extended = _extended(classes)
    if len(extended) > 2 * extended.shape[1] or axis_name:
        inverse = _inverse_of_gram(classes.axis_names, extended)[:-1, :-1]
    else:
        inverse = _pseudo_inverse(extended)[:-1]
        inverse = inverse @ inverse.T
    value = jnp.sum(within * inverse)
    differ = classes.total(jnp.any(classes.centred != 0, axis=1).astype(jnp.int32)) > 0
    value = jnp.where(differ, value, jnp.nan)
    return classes.defined(value if divided else classes.count * value)


def sum_of_cdnv(classes: ClassMeans, tile_size: int | None = None) -> Float[Array, ""]:
    """Σ over ordered pairs of different kept classes of (V_c + V_c')/(2‖μ_c − μ_c'‖²)."""

    def term(distances: Array, v: Array, other: Array) -> Array:
        return (v[:, None] + other[None, :]) / distances

    return sum_over_distances(
        term, classes.centred, classes.variances, classes.kept, tile_size=tile_size, axis_names=classes.axis_names
    )


def mean_square_in_means(residuals: Float[Array, "n m"], shares: Float[Array, " n"], classes: ClassMeans) -> Array:
    """NC1 of the samples themselves, E‖M̄⁺(h − μ_c)‖².

    NaN where all means are one: Σ_B⁺ = 0 would call that collapsed.
    """
    # The derivative of a pseudo-inverse is finite where that of a singular value decomposition is not: at equal
    # singular values, which is where collapse leads.
    coordinates = residuals @ _pseudo_inverse(_extended(classes))[:-1]
    value = jnp.sum(shares * jnp.sum(coordinates**2, axis=1))
    return jnp.where(jnp.any(classes.centred != 0), value, jnp.nan)


def _extended(classes: ClassMeans) -> Float[Array, "C _"]:
    """The centred means, and the one direction in which they do not differ, as they sum to 0.

    It is given a singular value of its own, that no cut is needed which would take the way between two close means for
    it.
    """
    size = jax.lax.stop_gradient(jnp.sqrt(classes.total(jnp.sum(classes.centred**2, axis=1)) / classes.count))
    sum_direction = jnp.where(classes.kept, size / jnp.sqrt(classes.count), 0)
    return jnp.concatenate([classes.centred, sum_direction[:, None]], axis=1)


def _pseudo_inverse(matrix: Float[Array, "a b"]) -> Float[Array, "b a"]:
    """What is cut is rounding."""
    return jnp.linalg.pinv(matrix, rtol=4 * jnp.finfo(matrix.dtype).eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inverse_of_gram(names: tuple[str, ...], rows: Float[Array, "C k"]) -> Float[Array, "k k"]:
    """(XᵀX)⁺ of many rows, which need not be on one device, without squaring what they are conditioned by."""
    inverse = _pseudo_inverse(_triangular(names, rows))
    return inverse @ inverse.T


# A QR decomposition has no derivative at lower rank, and that of a pseudo-inverse of all rows is of their size.
@_inverse_of_gram.defjvp
def _inverse_of_gram_jvp(
    names: tuple[str, ...], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Float[Array, "k k"], Float[Array, "k k"]]:
    (rows,), (d_rows,) = primals, tangents
    inverse = _inverse_of_gram(names, rows)
    half = sum_over_devices(rows.T @ d_rows, names)
    change = half + half.T
    # On what the rows span: as precise as their triangular factor is, with the derivative of a product.
    triangular = jax.lax.stop_gradient(_triangular(names, rows))
    product = inverse @ sum_over_devices(rows.T @ rows, names)
    span = _pseudo_inverse(triangular) @ triangular + (product - jax.lax.stop_gradient(product))
    beyond = inverse @ inverse @ change @ (jnp.eye(len(span), dtype=span.dtype) - span.T)
    return inverse, beyond + beyond.T - inverse @ change @ inverse


def _triangular(names: tuple[str, ...], rows: Float[Array, "C k"]) -> Float[Array, "_ k"]:
    """A few rows R with RᵀR = XᵀX."""

    def fewer(rows: Array) -> Array:
        return jnp.linalg.qr(rows, mode="r") if len(rows) > rows.shape[1] else rows

    rows = fewer(jax.lax.stop_gradient(rows))
    if not names:
        return rows
    # Gathered by a sum, of which the compiler knows that it is the same on all devices.
    of_devices = jnp.zeros((jax.lax.axis_size(names), *rows.shape), rows.dtype)
    of_devices = sum_over_devices(of_devices.at[jax.lax.axis_index(names)].set(rows), names)
    return fewer(of_devices.reshape(-1, rows.shape[1]))
