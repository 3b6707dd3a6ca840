"""The spectrum of features that come in batches, without the loss of digits of a covariance.

The scatter matrix of N centred features is Rᵀ R, with R (m, m) the triangular factor of their QR decomposition. For two
sets, of masses a and b and with means δ apart, R is the factor of R_a, R_b and the row √(ab/(a + b)) δᵀ below each
other. No square is taken for this sum of squares.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flatjax.core.double_word import Double
from flatjax.core.integers import whole_number
from flatjax.core.metric import metric
from flatjax.core.sharding import num_devices
from flatjax.core.units import root_of_squares
from flatjax.representations.geometry import centred, read_features, without_rounding
from flatjax.representations.spectrum import FIT_RANGE, RepresentationGeometry, geometry_of_spectrum
from flatjax.samples import Features, Weights


class FeatureSpectrum(NamedTuple):
    """All that the geometry of a stream of features needs: `init`, then `update` with each batch, or `merge`.

    It is a pytree of m² + 2m + 3 numbers, to be donated: `jax.jit(FeatureSpectrum.update, donate_argnums=0)`. Several
    layers at once are kept by `jax.vmap`. It has no derivative.

    Notes:
        An update with N samples costs about 2 m² (N + m) operations, those of a QR decomposition. It takes ten times as
        long on a CPU as the product of matrices of a covariance: take batches of N ≥ m. Samples split among devices are
        decomposed where they lie.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.representations import FeatureSpectrum
        >>> spectrum = FeatureSpectrum.init(num_features=2)
        >>> for feats in ([[3.0, 0.0], [-3.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]):
        ...     spectrum = spectrum.update(jnp.array(feats, jnp.float32))
        >>> print(f"{spectrum.geometry().rankme:.4f}")
        1.7548
    """

    count: Int[Array, ""]
    """The number of samples of weight above 0."""
    mass: Float[Array, ""]
    """The sum Σω of the weights."""
    mean: Double
    """The mean μ (m,) of the features."""
    triangle: Float[Array, "m m"]
    """The triangular factor R, with Rᵀ R = Σ ω (h − μ)(h − μ)ᵀ."""
    num_bad: Int[Array, ""]
    """The number of batches with a feature that is not finite or a negative weight: one makes the geometry NaN."""

    @classmethod
    def init(cls, num_features: int, *, dtype: DTypeLike = jnp.float32) -> "FeatureSpectrum":
        """A spectrum of no samples yet, to `update` with batches.

        Raises:
            TypeError: another dtype than float32 or float64, or one that JAX has not enabled.
            ValueError: fewer than 1 feature.
        """
        num_features = whole_number(num_features, "num_features", least=1)
        if jnp.dtype(dtype) not in (jnp.float32, jnp.float64) or jnp.zeros(0, dtype).dtype != dtype:
            raise TypeError(f"dtype is {jnp.dtype(dtype)}, wanted float32, or float64 with jax_enable_x64")
        return _empty(num_features, jnp.dtype(dtype))

    @metric(placed="as the first")
    def update(self, feats: Features, weights: Weights | None = None) -> "FeatureSpectrum":
        """Adds one more batch of features (..., m), with weights (...,), 1 by default; 0 is padding.

        Raises:
            TypeError: `feats` are not floating, or wider than the spectrum.
            ValueError: the shapes do not fit.
        """
        feats, dtype = jnp.asarray(feats), self.triangle.dtype
        if feats.shape[-1:] != self.mean.high.shape:
            raise ValueError(f"feats has shape {feats.shape}, but the spectrum is of {len(self.triangle)} features")
        if feats.dtype.itemsize > dtype.itemsize:
            raise TypeError(f"feats has dtype {feats.dtype}, but the spectrum is {dtype}: cast one of them")
        weights = None if weights is None else jnp.asarray(weights).astype(dtype)
        return _updated(self, feats.astype(dtype), weights)

    @metric(placed="as the first")
    def merge(self, other: "FeatureSpectrum") -> "FeatureSpectrum":
        """Merges the spectra of two sets of samples; their order changes nothing beyond rounding.

        Raises:
            ValueError: they are of other features.
        """
        if self.triangle.shape != other.triangle.shape:
            raise ValueError(f"spectra of {len(self.triangle)} and {len(other.triangle)} features cannot be merged")
        return _merged(self, other)

    @metric
    def geometry(self, *, fit_range: tuple[int, int] = FIT_RANGE) -> RepresentationGeometry:
        """The `representation_geometry` of all samples; NaN for fewer than 2."""
        triangle = self.triangle / jnp.sqrt(jnp.where(self.mass > 0, self.mass, 1))
        triangle = without_rounding(triangle, root_of_squares(triangle), self.mean)
        sound = (self.num_bad == 0) & jnp.all(jnp.isfinite(triangle))
        sizes = jnp.linalg.svd(jnp.where(sound, triangle, 0), compute_uv=False)
        resolution = len(triangle) ** 0.5 * float(jnp.finfo(triangle.dtype).eps)
        return geometry_of_spectrum(jnp.where(sound, sizes, jnp.nan), resolution, self.count, fit_range)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty(num_features: int, dtype: jnp.dtype) -> FeatureSpectrum:
    return FeatureSpectrum(
        count=jnp.zeros((), jnp.int32),
        mass=jnp.zeros((), dtype),
        mean=Double.zeros((num_features,), dtype),
        triangle=jnp.zeros((num_features, num_features), dtype),
        num_bad=jnp.zeros((), jnp.int32),
    )


def _updated(
    spectrum: FeatureSpectrum, feats: Float[Array, "*n m"], weights: Float[Array, "*n"] | None
) -> FeatureSpectrum:
    samples = read_features(feats, weights)
    sound = jnp.isfinite(jnp.sum(samples.weights))
    weights = jnp.where(samples.counts & sound, samples.weights, 0)
    rows = jnp.where((weights > 0)[:, None], samples.feats, 0)
    mass = jnp.sum(weights)
    shares = weights / jnp.where(mass > 0, mass, 1)
    mean, offsets = centred(rows, shares, weights > 0)
    # Where samples do not count, they are far off.
    rows = jnp.where((weights > 0)[:, None], jnp.sqrt(weights)[:, None] * offsets, 0)
    n, m = rows.shape
    num_parts = math.gcd(n, num_devices(feats))
    if num_parts > 1:
        rows = jnp.linalg.qr(rows.reshape(num_parts, n // num_parts, m), mode="r").reshape(-1, m)
    return _joined(
        spectrum,
        rows,
        count=jnp.sum(weights > 0, dtype=jnp.int32),
        mass=mass,
        mean=mean,
        num_bad=(~sound).astype(jnp.int32),
    )


def _merged(one: FeatureSpectrum, other: FeatureSpectrum) -> FeatureSpectrum:
    return _joined(one, other.triangle, count=other.count, mass=other.mass, mean=other.mean, num_bad=other.num_bad)


def _joined(
    spectrum: FeatureSpectrum,
    rows: Float[Array, "k m"],
    *,
    count: Int[Array, ""],
    mass: Float[Array, ""],
    mean: Double,
    num_bad: Int[Array, ""],
) -> FeatureSpectrum:
    total = spectrum.mass + mass
    share = mass / jnp.where(total > 0, total, 1)
    is_one_empty = (spectrum.mass == 0) | (mass == 0)
    shift = jnp.where(is_one_empty, 0, mean.minus(spectrum.mean))
    between = jnp.sqrt(spectrum.mass * share) * shift
    triangle = jnp.linalg.qr(jnp.concatenate([spectrum.triangle, rows, between[None, :]]), mode="r")
    return FeatureSpectrum(
        count=spectrum.count + count,
        mass=total,
        mean=mean.where(spectrum.mass == 0, spectrum.mean.plus(share * shift)),
        triangle=triangle,
        num_bad=spectrum.num_bad + num_bad,
    )
