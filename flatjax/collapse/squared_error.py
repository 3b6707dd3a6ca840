"""Collapse under the mean squared error: what a network loses by its features, and by its head beside the best one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from flatjax.collapse.moments import ClassMoments, check_moments
from flatjax.core import results
from flatjax.core.dtypes import computing_dtype
from flatjax.core.metric import metric
from flatjax.heads import HeadParams, linear_head


class SquaredErrorDecomposition(NamedTuple):
    """The result of `squared_error_decomposition`: parts of a mean squared error, none negative.

    The parts are scalars, or under `vmap` one for each of the batch. On the central path, to which training converges,
    the last is 0.

    Attributes:
        nc1: ½[tr W_LS (Σ_W + λI) W_LSᵀ + λ‖b_LS‖²], what the best head loses by the spread within the classes.
        nc2_and_nc3: ½ Σ_c π_c ‖W_LS μ_c + b_LS − e_c‖², what it loses by where the class means lie.
        perpendicular: ½ E‖Δ_W h + Δ_b‖² + ½λ(‖Δ_W‖² + ‖Δ_b‖²), what the head loses by not being the best one.
    """

    nc1: Float[Array, ""]
    nc2_and_nc3: Float[Array, ""]
    perpendicular: Float[Array, ""]

    to_dict = results.to_dict
    __str__ = results.to_table

    @property
    def total(self) -> Float[Array, ""]:
        """The whole loss ½ E‖Wh + b − y‖² + ½λ(‖W‖² + ‖b‖²)."""
        return self.nc1 + self.nc2_and_nc3 + self.perpendicular


@metric
def squared_error_decomposition(
    params: HeadParams,
    means: Float[ArrayLike, "C m"],
    within_covariance: Float[ArrayLike, "m m"],
    masses: Real[ArrayLike, " C"],
    weight_decay: ArrayLike = 0.0,
) -> SquaredErrorDecomposition:
    """Splits a mean squared error against one-hot targets y into three parts, from the moments of the classes.

        ½ E‖Wh + b − y‖² + ½λ(‖W‖² + ‖b‖²) = L_NC1 + L_NC2/3 + L_⊥

    with the best head W_LS, b_LS of `least_squares_head` and Δ the head less that one. The first two parts depend only
    on the features. The decomposition was published for classes of one size, where π_c = 1/C. Here it holds for the
    share π_c of samples, or of their weights, that each class has.

    Args:
        params: the head of C outputs, as for `relative_flatness`; one without bias has the bias 0.
        means: μ_c (C, m). The means of classes of mass 0 may hold anything.
        within_covariance: Σ_W = Σ_i ω_i (h_i − μ_c(i))(h_i − μ_c(i))ᵀ / Σ_i ω_i (m, m), over all samples.
        masses: n_c or Σω of each class (C,), in any unit.
        weight_decay: λ ≥ 0 as in the formula: that of `optax.add_decayed_weights` for the loss ½‖Wh + b − y‖².

    Returns:
        A `SquaredErrorDecomposition`, in float64 if any input is, else in float32. It is NaN where a moment or the head
        is not finite, a mass or λ negative, or Σ_W + λI no covariance.

    Raises:
        TypeError: `params` is no mapping, or an array not of a floating dtype.
        ValueError: shapes that do not fit each other.

    Notes:
        No part is a difference: each keeps its digits however small it is against the others, as far as the moments
        have them. What is below the rounding of a covariance, ε·tr Σ_W, is not known: with λ = 0 a spread below that,
        in directions in which the means differ, is taken to be as large. The memory is that of a few (C, C), (m, m) and
        (C, m) arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import squared_error_decomposition
        >>> head = {"kernel": jnp.array([[0.4, -0.4]]), "bias": jnp.array([0.5, 0.5])}
        >>> means, within = jnp.array([[1.0], [-1.0]]), jnp.array([[0.25]])
        >>> parts = squared_error_decomposition(head, means, within, jnp.array([10, 10]))
        >>> print(f"{parts.nc1:.4f} + {parts.nc2_and_nc3:.4f} + {parts.perpendicular:.4f} = {parts.total:.4f}")
        0.0400 + 0.0100 + 0.0000 = 0.0500

    References:
        Han, Papyan, Donoho: *Neural Collapse Under MSE Loss: Proximity to and Dynamics on the Central Path*, ICLR 2022.
    """
    head = linear_head(params)
    moments = _moments(means, within_covariance, masses, weight_decay, (head.matrix, head.bias))
    if (head.num_outputs, head.num_features) != moments.means.shape:
        raise ValueError(
            f"means has shape {moments.means.shape}, (classes, features), but the head takes {head.num_features} "
            f"features to {head.num_outputs} outputs"
        )
    head = head.astype(moments.means.dtype)
    best = _best_head(moments)
    s = jnp.sqrt(moments.shares)
    at_means = head.weight @ moments.means.T + head.bias[:, None] - jnp.eye(len(s), dtype=s.dtype)

    def half_square(*parts: Float[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(jnp.stack([jnp.sum(part**2) for part in parts])) / 2

    return SquaredErrorDecomposition(
        nc1=half_square(best.within, best.bias),
        nc2_and_nc3=half_square(best.at_means),
        perpendicular=half_square(
            head.weight @ moments.root - best.within,
            at_means * s[None, :] - best.at_means,
            jnp.sqrt(moments.weight_decay) * head.bias - best.bias,
        ),
    )


@metric
def central_path(moments: ClassMoments, params: HeadParams, weight_decay: ArrayLike = 0.0) -> SquaredErrorDecomposition:
    """Makes the `squared_error_decomposition` of a head on a stream's features; those of small classes count too.

    Args:
        moments: the moments of the features, kept with `covariance=True`.
        params: the head of C outputs, as for `relative_flatness`; one without bias has the bias 0.
        weight_decay: λ ≥ 0, as for `squared_error_decomposition`.

    Returns:
        A `SquaredErrorDecomposition`, NaN where that of `squared_error_decomposition` would be.

    Raises:
        TypeError, ValueError: as there, or the moments are no `ClassMoments`, or have no covariance.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import central_path
        >>> from flatjax.collapse.moments import ClassMoments
        >>> moments = ClassMoments.init(num_classes=2, num_features=1, covariance=True)
        >>> feats = jnp.array([[1.5], [0.5], [-0.5], [-1.5]], jnp.float32)
        >>> moments = moments.update(feats, jnp.array([0, 0, 1, 1]))
        >>> head = {"kernel": jnp.array([[0.5, -0.5]]), "bias": jnp.array([0.5, 0.5])}
        >>> parts = central_path(moments, head)
        >>> print(f"{parts.nc1:.4f} + {parts.nc2_and_nc3:.4f} + {parts.perpendicular:.4f} = {parts.total:.4f}")
        0.0400 + 0.0100 + 0.0125 = 0.0625
    """
    check_moments(moments)
    return squared_error_decomposition(
        params, moments.means, moments.covariance, moments.masses, weight_decay=weight_decay
    )


@metric
def least_squares_head(
    means: Float[ArrayLike, "C m"],
    within_covariance: Float[ArrayLike, "m m"],
    masses: Real[ArrayLike, " C"],
    weight_decay: ArrayLike = 0.0,
) -> dict[str, Float[Array, "..."]]:
    """The head of the least mean squared error ½ E‖Wh + b − y‖² + ½λ(‖W‖² + ‖b‖²), y one-hot.

        W_LS = [diag(π) Mᵀ − π μᵀ/(1 + λ)] [Σ_W + M diag(π) Mᵀ − μμᵀ/(1 + λ) + λI]⁻¹,    b_LS = (π − W_LS μ)/(1 + λ)

    with M = [μ_c], π the shares of the classes and μ = Mπ. If λ is 0 and many heads are best, the result is one of
    nearly the least norm. Args and errors are those of `squared_error_decomposition`.

    Returns:
        `kernel` (m, C) and `bias` (C,), as Flax keeps a head. A class of mass 0 has zeros.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import least_squares_head
        >>> head = least_squares_head(jnp.array([[1.0], [-1.0]]), jnp.array([[0.25]]), jnp.array([10, 10]))
        >>> print(f"{head['kernel'][0, 0]:.3f} {head['kernel'][0, 1]:.3f}, {head['bias'][0]:.3f}")
        0.400 -0.400, 0.500

    References:
        Han, Papyan, Donoho: *Neural Collapse Under MSE Loss: Proximity to and Dynamics on the Central Path*, ICLR 2022.
    """
    moments = _moments(means, within_covariance, masses, weight_decay)
    within = _best_head(moments).within
    kernel = jax.scipy.linalg.solve_triangular(moments.root, within.T, lower=True, trans=1)
    return {"kernel": kernel, "bias": (moments.shares - moments.mean @ kernel) / (1 + moments.weight_decay)}


class _Moments(NamedTuple):
    means: Float[Array, "C m"]
    shares: Float[Array, " C"]
    weight_decay: Float[Array, ""]
    centred: Float[Array, "C m"]
    """The centred means μ_c − μ."""
    mean: Float[Array, " m"]
    root: Float[Array, "m m"]
    """A lower triangular root of the covariance: root rootᵀ = Σ_W + λI."""


class _BestHead(NamedTuple):
    """Products of the best head with the features, which are known better than that head is."""

    within: Float[Array, "C m"]
    """The product W_LS root."""
    at_means: Float[Array, "C C"]
    """The errors at the means, (W_LS M + b_LS 1ᵀ − I) diag(√π)."""
    bias: Float[Array, " C"]
    """The scaled bias √λ b_LS."""


def _moments(
    means: ArrayLike,
    within_covariance: ArrayLike,
    masses: ArrayLike,
    weight_decay: ArrayLike,
    of_head: tuple[Array, ...] = (),
) -> _Moments:
    means, within, masses, decay = (jnp.asarray(x) for x in (means, within_covariance, masses, weight_decay))
    for name, array in {"means": means, "within_covariance": within}.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {array.dtype}, wanted a floating dtype")
    if means.ndim != 2 or 0 in means.shape:
        raise ValueError(f"means has shape {means.shape}, wanted (classes, features), both at least 1")
    num_classes, num_features = means.shape
    for name, array, wanted in (
        ("within_covariance", within, (num_features, num_features)),
        ("masses", masses, (num_classes,)),
        ("weight_decay", decay, ()),
    ):
        if array.shape != wanted:
            raise ValueError(f"{name} has shape {array.shape}, wanted {wanted}, as means has {means.shape}")

    dtype = computing_dtype(means, within, masses, *of_head)
    within, masses, decay = (x.astype(dtype) for x in (within, masses, decay))
    decay = jnp.where(decay < 0, jnp.nan, decay)
    means = jnp.where(masses[:, None] == 0, 0, means.astype(dtype))
    shares = jnp.where(masses < 0, jnp.nan, masses) / jnp.sum(masses)
    mean = shares @ means
    centred = jnp.where(masses[:, None] == 0, 0, means - mean[None, :])

    # A covariance is known up to its rounding, and is positive definite once that is added; where nothing is within,
    # the same of the means, cubed, keeps their quotient a number.
    eps = jnp.finfo(dtype).eps
    rounding = 2 * eps * jnp.trace(within) + eps**3 * jnp.sum(shares[:, None] * centred**2) + jnp.finfo(dtype).tiny
    root = jnp.linalg.cholesky(within + (decay + rounding) * jnp.eye(num_features, dtype=dtype))
    return _Moments(means, shares, decay, centred, mean, root)


def _best_head(moments: _Moments) -> _BestHead:
    """Finds the best head in coordinates in which the features within the classes are white.

    Directions to nothing exist there.

    With s = √π and ε² = λ/(1 + λ), P = I − (1 − ε)ssᵀ and X = diag(s)[μ_c − μ + εμ]ᵀ, the two matrices of the formula
    for W_LS are diag(s)PX and Σ_W + λI + XᵀX. So for Y = X root⁻ᵀ and A = (I + YYᵀ)⁻¹

        W_LS root = diag(s)PAY,    (W_LS M + b_LS 1ᵀ − I) diag(s) = −diag(s)PAP,    √λ b_LS = diag(s)PAs/√(1 + λ)

    which are products, none of which cancels.
    """
    s, decay = jnp.sqrt(moments.shares), moments.weight_decay
    left = jnp.sqrt(decay / (1 + decay))
    scaled = s[:, None] * (moments.centred + left * moments.mean[None, :])
    white = jax.scipy.linalg.solve_triangular(moments.root, scaled.T, lower=True).T
    # Without decay P leaves nothing of s, of which Y has none; rounded it has, unless A makes as little of s as of
    # what Y is large in.
    size = jax.lax.stop_gradient(jnp.where(decay == 0, jnp.sqrt(jnp.sum(white**2)), 0))
    inverse, filtered = _resolvent(jnp.concatenate([white, size * s[:, None]], axis=1))

    def projected(rows: Float[Array, "C k"]) -> Float[Array, "C k"]:
        return rows - (1 - left) * s[:, None] * (s @ rows)[None, :]

    return _BestHead(
        within=s[:, None] * projected(filtered[:, :-1]),
        at_means=-s[:, None] * projected(projected(inverse).T),
        bias=s * projected((inverse @ s)[:, None])[:, 0] / jnp.sqrt(1 + decay),
    )


@jax.custom_jvp
def _resolvent(rows: Float[Array, "C m"]) -> tuple[Float[Array, "C C"], Float[Array, "C m"]]:
    """The matrices (I + YYᵀ)⁻¹ and (I + YYᵀ)⁻¹Y, whatever the rank and the size of Y."""
    U, values, Vh = jnp.linalg.svd(rows, full_matrices=False)
    squares = values**2
    filtered = (U * (values / (1 + squares))[None, :]) @ Vh
    if len(rows) <= rows.shape[1]:
        return (U / (1 + squares)[None, :]) @ U.T, filtered
    return jnp.eye(len(rows), dtype=rows.dtype) - (U * (squares / (1 + squares))[None, :]) @ U.T, filtered


# Singular vectors have none at equal singular values, which is where collapse leads; these two have.
@_resolvent.defjvp  # pyrefly: ignore[bad-argument-type]
def _resolvent_jvp(
    primals: tuple[Float[Array, "C m"]], tangents: tuple[Float[Array, "C m"]]
) -> tuple[tuple[Float[Array, "C C"], Float[Array, "C m"]], tuple[Float[Array, "C C"], Float[Array, "C m"]]]:
    (rows,), (changes,) = primals, tangents
    inverse, filtered = _resolvent(rows)
    half = filtered @ changes.T @ inverse
    of_filtered = inverse @ (changes - changes @ rows.T @ filtered) - filtered @ changes.T @ filtered
    return (inverse, filtered), (-half - half.T, of_filtered)
