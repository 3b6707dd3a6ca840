"""Geometry of a layer's features: how many directions they fill, and how fast the variance along them falls."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from flatjax.core.double_word import Double
from flatjax.core.dtypes import computing_dtype
from flatjax.core.metric import metric
from flatjax.core.units import safe_sqrt
from flatjax.heads import LinearHead
from flatjax.representations.spectrum import FIT_RANGE, RepresentationGeometry, geometry_of_spectrum
from flatjax.samples import Features, Samples, Weights, flatten_samples


@metric
def representation_geometry(
    feats: Features,
    weights: Weights | None = None,
    *,
    fit_range: tuple[int, int] = FIT_RANGE,
) -> RepresentationGeometry:
    r"""RankMe, participation ratio and α-ReQ of features, from the singular values of the centred features.

        RankMe = exp(−Σ p_i log p_i), p = σ/Σσ or λ/Σλ,    (Σλ)²/Σλ²,    α = −d log λ_i / d log i,    λ_i = σ_i²

    Larger RankMe and participation ratio mean that more directions are filled, and a larger α that the variance along
    them falls faster.

    Args:
        feats: features (..., m). The leading shape is that of N samples, for example tokens.
        weights: sample weights (...,), 1 by default. A sample of weight 0 is padding, whatever it holds, and the
            derivative in that weight is 0.
        fit_range: the first and the last of the eigenvalues to fit α to, both included and counted from 1. Static.

    Returns:
        A `RepresentationGeometry`, in float64 if any input is, else in float32. All is NaN where a feature is not
        finite or its square is not, a weight negative, or the samples are all the same. Only α is NaN where the fit
        range goes beyond the eigenvalues above rounding, at most min(N − 1, m) in number: give another range then, and
        say so, as α depends on it.

    Raises:
        TypeError: the features are not floating, or the weights not real.
        ValueError: shapes that do not fit, no sample, or a fit range of fewer than 3 eigenvalues.

    Notes:
        The features are centred, and never multiplied with themselves: a σ_i is known to about ε σ_1. Through a
        covariance it would be known to √ε σ_1. In float32 that is 1e-7 against 3e-4. In language models, where a few
        directions are a thousand times as large as most, it decides. A feature that differs between samples by no more
        than the rounding of its own size is constant.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import representation_geometry
        >>> feats = jnp.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], jnp.float32)
        >>> geometry = representation_geometry(feats)
        >>> print(f"{geometry.rankme:.4f} {geometry.rankme_of_variances:.4f} {geometry.participation_ratio:.4f}")
        1.7548 1.3841 1.2195
        >>> print(geometry.variances.round(3), geometry.is_rank_limited)
        [4.5 0.5] True

    References:
        Garrido, Balestriero, Najman, LeCun: *RankMe: Assessing the Downstream Performance of Pretrained
        Self-Supervised Representations by Their Rank*, ICML 2023.
        Agrawal, Mondal, Ghosh, Richards: *α-ReQ: Assessing Representation Quality in Self-Supervised Learning by
        Measuring Eigenspectrum Decay*, NeurIPS 2022.
    """
    samples = read_features(feats, weights)
    shares, sound = _sound_shares(samples)
    centre, offsets = centred(samples.feats, shares, samples.counts)
    rows = safe_sqrt(shares)[:, None] * without_rounding(offsets, jnp.max(jnp.abs(offsets), axis=0), centre)
    (n, m), epsilon = rows.shape, float(jnp.finfo(rows.dtype).eps)
    sizes = jnp.linalg.svd(rows, compute_uv=False)
    sizes = jnp.where(sound, jnp.concatenate([sizes, jnp.zeros(max(0, m - n), rows.dtype)]), jnp.nan)
    return geometry_of_spectrum(sizes, m**0.5 * epsilon, jnp.sum(samples.counts), fit_range)


@metric
def geometry_of_covariance(
    covariance: Float[ArrayLike, "m m"],
    num_samples: Integer[ArrayLike, ""] | int,
    *,
    fit_range: tuple[int, int] = FIT_RANGE,
) -> RepresentationGeometry:
    """Measures the geometry of features if only their covariance was kept, for example by `ClassMoments` of one class.

    Args:
        covariance: (m, m), symmetric.
        num_samples: N, the number of samples that the covariance is of.
        fit_range: as for `representation_geometry`.

    Returns:
        A `RepresentationGeometry`. It is NaN where an entry is not finite, all are 0, or an eigenvalue is negative
        beyond rounding.

    Raises:
        TypeError: the covariance is not floating.
        ValueError: it is not square, or the fit range one of fewer than 3 eigenvalues.

    Notes:
        Eigenvalues of √m ε λ_1 and less cannot be told from the rounding of a covariance, and count as 0: these are σ
        below 2e-3 of the largest in float32 at m = 768. If `num_resolved` is far below m, so is RankMe below its value:
        keep a `FeatureSpectrum` instead, which knows σ to about ε σ_1.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import ClassMoments
        >>> from flatjax.representations import geometry_of_covariance
        >>> moments = ClassMoments.init(num_classes=1, num_features=2, covariance=True)
        >>> for feats in ([[3.0, 0.0], [-3.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]):
        ...     moments = moments.update(jnp.array(feats, jnp.float32), jnp.zeros(2, int))
        >>> geometry = geometry_of_covariance(moments.covariance, moments.counts[0])
        >>> print(f"{geometry.rankme:.4f}")
        1.7548
    """
    covariance = jnp.asarray(covariance)
    if not jnp.issubdtype(covariance.dtype, jnp.floating):
        raise TypeError(f"covariance has dtype {covariance.dtype}, wanted a floating dtype")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or 0 in covariance.shape:
        raise ValueError(f"covariance has shape {covariance.shape}, wanted (m, m)")
    covariance = covariance.astype(computing_dtype(covariance))
    m, epsilon = len(covariance), float(jnp.finfo(covariance.dtype).eps)
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(covariance)))
    sound = jnp.isfinite(size) & (size > 0)
    eigenvalues = jnp.linalg.eigvalsh(jnp.where(sound, covariance / jnp.where(sound, size, 1), 0))[::-1]
    resolution = m**0.5 * epsilon
    sound &= eigenvalues[-1] >= -resolution * eigenvalues[0]
    is_positive = eigenvalues > 0
    sizes = jnp.where(is_positive, jnp.sqrt(size) * jnp.sqrt(jnp.where(is_positive, eigenvalues, 1)), 0)
    return geometry_of_spectrum(jnp.where(sound, sizes, jnp.nan), resolution**0.5, num_samples, fit_range)


def read_features(feats: ArrayLike, weights: ArrayLike | None) -> Samples:
    """Flattens and checks features, with labels that mean nothing.

    Raises:
        TypeError: the features are not floating, or the weights not real.
        ValueError: the shapes do not fit, or there is no sample or no feature.
    """
    feats = jnp.asarray(feats)
    if feats.ndim < 1 or feats.shape[-1] < 1:
        raise ValueError(f"feats has shape {feats.shape}, wanted (..., m), m at least 1")
    if not jnp.issubdtype(feats.dtype, jnp.floating):
        raise TypeError(f"feats has dtype {feats.dtype}, wanted a floating dtype")
    of_features = LinearHead(jnp.zeros((1, feats.shape[-1]), feats.dtype), jnp.zeros(1, feats.dtype))
    return flatten_samples(of_features, feats, jnp.zeros(feats.shape[:-1], jnp.int32), weights)


def _sound_shares(samples: Samples) -> tuple[Float[Array, " n"], Array]:
    """Shares that are numbers in any case, as no decomposition is to be given NaN; and whether all were."""
    sound = jnp.isfinite(jnp.sum(samples.shares))
    return jnp.where(sound, samples.shares, 1 / len(samples.feats)), sound


def centred(
    feats: Float[Array, "n m"], shares: Float[Array, " n"], counts: Bool[Array, " n"]
) -> tuple[Double, Float[Array, "n m"]]:
    """The weighted mean, and the features less it, to rounding of the differences between samples.

    They are taken from one of the samples first. A mean is rounded to ε times its size, and if all features were the
    same that would be left as a spread.
    """
    is_first = counts & (jnp.arange(len(feats)) == jnp.argmax(counts))
    # Summed, not sliced: of samples split among devices a slice is cut once all are gathered.
    origin = jnp.sum(jnp.where(is_first[:, None], feats, 0), axis=0)
    offsets, centre = feats - origin[None, :], Double(origin, jnp.zeros_like(origin))
    for _ in range(2):
        shift = shares @ offsets
        offsets, centre = offsets - shift[None, :], centre.plus(shift)
    return centre, offsets


def without_rounding(rows: Float[Array, "k m"], spread: Float[Array, " m"], centre: Double) -> Float[Array, "k m"]:
    """The rows, with 0 for features that differ by no more than numbers of their size are rounded by.

    Those are constant.
    """
    is_rounding = spread <= float(jnp.finfo(rows.dtype).eps) * jnp.abs(centre.high)
    return jnp.where(is_rounding[None, :], 0, rows)
