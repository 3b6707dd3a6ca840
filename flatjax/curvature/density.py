"""The spectral density of a curvature, by stochastic Lanczos quadrature."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from flatjax.core import results
from flatjax.core.integers import whole_number
from flatjax.curvature.estimate import check_num_probes, mean_of
from flatjax.curvature.lanczos import Tridiagonal, lanczos
from flatjax.curvature.products import Curvature

_REACH = 6
"""How far the grid goes beyond the outermost nodes, in widths of a Gaussian; 1e-9 of its mass is further out."""


class SpectralDensity(NamedTuple):
    """Eigenvalues per unit of the axis, as a share of all of them, each smeared out to a Gaussian."""

    grid: Float[Array, " g"]
    density: Float[Array, " g"]
    """The density at the grid, which integrates to 1."""
    standard_error: Float[Array, " g"]
    """The standard error of the density, over probes; with too few steps it has a bias besides."""
    broadening: Float[Array, ""]
    """The standard deviation σ of the Gaussians."""
    num_probes: Integer[Array, ""]

    to_dict = results.to_dict
    __str__ = results.to_table


def spectral_density(
    curvature: Curvature,
    key: Key[Array, ""],
    *,
    num_probes: int = 8,
    num_steps: int = 64,
    num_points: int = 1024,
    broadening: float | None = None,
) -> SpectralDensity:
    """The density of eigenvalues of a curvature C with n of them, by stochastic Lanczos quadrature.

        ρ(x) = 1/n Σ_i N(x; λ_i, σ²) = E ⟨v, N(x; C, σ²) v⟩ ≈ E Σ_k s_k1² N(x; θ_k, σ²)

    over random unit vectors v, with θ_k and s_k the eigenvalues and eigenvectors of the tridiagonal matrix that
    Lanczos' method makes of C from v in `num_steps`.

    Args:
        curvature: a `Hessian`, `GaussNewton`, `Streamed`, or any other.
        key: the random key of the vectors.
        num_probes: how many vectors, at least 2, one after the other.
        num_steps: the number of products, and of vectors in memory, for each.
        num_points: the number of points of the grid, which runs 6 σ beyond the outermost nodes.
        broadening: σ; by default 1/100 of the distance of the outermost nodes, but no less than 1/1000 of the largest
            of them in magnitude, or 1/100 if all are 0.

    Returns:
        A `SpectralDensity`. The density is NaN if a product is, or if the points are further apart than σ, as it would
        then not integrate to 1.

    Raises:
        ValueError: fewer than 2 probes, fewer than 1 step or than 2 points, or a broadening that is not positive.

    Notes:
        The quadrature is exact for polynomials of degree 2 num_steps − 1. Gaussians much narrower than the spectrum's
        width over num_steps make a comb of nodes, not a density.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.curvature.products import Hessian
        >>> hessian = Hessian(lambda w: jnp.sum(w**3), jnp.repeat(jnp.array([1.0, 2.0], "float32"), 50))
        >>> spectrum = spectral_density(hessian, jax.random.key(0), broadening=1.0)
        >>> print(f"{jnp.trapezoid(spectrum.density, spectrum.grid):.4f}")
        1.0000
        >>> below_9 = jnp.trapezoid(jnp.where(spectrum.grid < 9, spectrum.density, 0), spectrum.grid)
        >>> print(f"{below_9:.2f}")
        0.55

    References:
        Ghorbani, Krishnan, Xiao: *An Investigation into Neural Net Optimization via Hessian Eigenvalue Density*, ICML
        2019.
        Lin, Saad, Yang: *Approximating spectral densities of large matrices*, SIAM Review 58, 2016.
    """
    check_num_probes(num_probes)
    num_points = whole_number(num_points, "num_points", least=2)
    if not (broadening is None or isinstance(broadening, jax.core.Tracer) or broadening > 0):
        raise ValueError(f"broadening is {broadening}, wanted it above 0, or None for a share of the spectrum's width")
    keys = jax.random.split(key, num_probes)
    rules = [_quadrature(lanczos(curvature, keys[i], num_steps=num_steps)) for i in range(num_probes)]
    nodes, weights = (jnp.stack(parts) for parts in zip(*rules, strict=True))
    return _smeared(nodes, weights, broadening, num_points)


@jax.jit
def _quadrature(tridiagonal: Tridiagonal) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Nodes and weights of Gauss' quadrature."""
    nodes, vectors = tridiagonal.eigenpairs()
    return nodes, vectors[0] ** 2


@functools.partial(jax.jit, static_argnames="num_points")
def _smeared(
    nodes: Float[Array, "p k"], weights: Float[Array, "p k"], broadening: float | Array | None, num_points: int
) -> SpectralDensity:
    lowest, highest = jnp.min(nodes), jnp.max(nodes)
    if broadening is None:
        largest = jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
        width = jnp.maximum((highest - lowest) / 100, largest / 1000)
        width = jnp.where(width == 0, 0.01, width)
    else:
        width = jnp.asarray(broadening, nodes.dtype)
    reach = (highest - lowest) / 2 + _REACH * width
    offsets = jnp.linspace(-1, 1, num_points, dtype=nodes.dtype) * reach
    middle = lowest + (highest - lowest) / 2

    def of_probe(rule: tuple[Float[Array, " k"], Float[Array, " k"]]) -> Float[Array, " g"]:
        nodes, weights = rule
        heights = jnp.exp(-(((offsets[:, None] - (nodes - middle)[None, :]) / width) ** 2) / 2)
        return jnp.sum(weights[None, :] * heights, axis=1) / (width * (2 * jnp.pi) ** 0.5)

    density, standard_error, count = mean_of(jax.lax.map(of_probe, (nodes, weights)))
    is_resolved = 2 * reach / (num_points - 1) <= width
    density, standard_error = (jnp.where(is_resolved, x, jnp.nan) for x in (density, standard_error))
    return SpectralDensity(middle + offsets, density, standard_error, width, count)
