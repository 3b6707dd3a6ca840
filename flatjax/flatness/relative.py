"""Relative flatness of a linear head, its variants, and the row-block traces behind them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.core.metric import metric
from flatjax.flatness.autodiff import AutodiffCurvature
from flatjax.flatness.frame import unit_for, unit_of
from flatjax.flatness.inputs import Loss, read_samples
from flatjax.flatness.separable import SeparableCurvature, sigmoid_cross_entropy, squared_error
from flatjax.flatness.softmax import SoftmaxCurvature, TiledSoftmaxCurvature, reads_in_tiles
from flatjax.heads import HeadParams, LinearHead
from flatjax.samples import Features, Labels, Samples, Weights

LogitCurvature = SoftmaxCurvature | SeparableCurvature | AutodiffCurvature
"""The Hessians G_i (d, d) of a loss in the logits, and their sums over samples of shares e_i."""


@metric
def relative_flatness(
    params: HeadParams,
    feats: Features,
    labels: Labels,
    weights: Weights | None = None,
    *,
    loss: Loss = "softmax_cross_entropy",
    tile_size: int | None = None,
) -> Float[Array, ""]:
    r"""Relative flatness κ of a linear head: larger is sharper.

        κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr H_{s,s'} = E_i ‖φ_i‖² tr(Wᵀ G_i W)

    with H_{s,s'} = ∂²L/∂w_s ∂w_s' the (m, m) blocks of the Hessian of L = Σ_i ω_i ℓ_i / Σ_i ω_i in the rows of W, and
    G_i = ∂²ℓ_i/∂z_i² in the logits z_i = Wφ_i + b. Unlike Tr H it does not change when the features are scaled up and
    the weights down. It has the unit of the loss. It is exact: nothing is sampled. Under softmax cross-entropy κ is the
    mean of ‖φ‖² times the variance of the rows of W under the predicted probabilities. It does not depend on which
    labels are right.

    Args:
        params: the head: a mapping (or `nnx.State`) with `kernel` (m, d), as Flax keeps it, `weight` (d, m), as PyTorch
            and Equinox do, or `embedding` (d, m) if it is tied, and optionally `bias` (d,); or the layer itself.
        feats: features (..., m), what enters the head. Any leading shape; the mean is over all of it.
        labels: integer classes (...,), or targets (..., d). For softmax cross-entropy these are probabilities; if they
            do not sum to 1, a sample's part of κ is scaled by their sum, as its loss is.
        weights: sample weights ω (...,), all 1 by default. A sample of weight 0, or of the class −100, is padding,
            whatever it holds. The derivative in a weight that is 0 is right too, but 0 where the class is −100 or the
            sample holds a bad value.
        loss: "softmax_cross_entropy", "squared_error" (½‖z − y‖²), "sigmoid_cross_entropy" (summed over the outputs),
            all in closed form; or any twice differentiable `(logits (d,), label) -> scalar`, in at most min(d, m)
            forward-over-reverse products in logit space. Static: `jax.jit(relative_flatness, static_argnames="loss")`.
            Pass one function in all calls, as each is compiled once.
        tile_size: how many rows of a softmax head are read at a time; the logits of all samples are then never in
            memory at once. Static. By default the shapes decide: n·d logits are in memory at once as long as they are
            at most 2²³, or d ≤ m. A `tile_size` of d or more forces that.

    Returns:
        κ, a scalar in the unit of the loss, in float64 if any input is, else in float32. It is NaN if a feature is not
        finite, a label of a named loss out of range, or a weight negative; `flatjax.check_inputs` says where. What a
        callable makes of a bad label is its own affair.

    Raises:
        TypeError: `params` is no mapping, the features are not floating, the weights not real, labels of one class a
            sample not integers, or the loss neither a name nor a callable.
        ValueError: a missing kernel, an unknown loss, shapes that do not fit, or a `tile_size` below 1 or for another
            loss than softmax cross-entropy.

    Notes:
        Precision: the form used for softmax cross-entropy keeps its digits at any confidence. In float32 the relative
        error is about 1e-7 where κ is about 1. At κ = 1e-20 it is 1e-5, as logits of 90 are themselves rounded by as
        much. It grows to about 10 ε/ρ² where the samples hesitate between rows that are close to each other, each
        sample between others, at a share ρ of the spread of all these rows: 1e-4 to 1e-3 for ρ = 1 %. With tiles that
        spread is measured around the mean row which eight of the samples predict.

        Cost: in tiles it takes 2 products of matrices, n·d·m each.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import relative_flatness
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -2.0]]), "bias": jnp.zeros(3)}
        >>> feats, labels = jnp.array([[1.0], [-1.0]]), jnp.array([0, 2])
        >>> print(f"{jax.jit(relative_flatness)(params, feats, labels):.4f}")
        0.6344
        >>> print(f"{relative_flatness({'kernel': params['kernel'] / 10}, 10 * feats, labels):.4f}")
        0.6344

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021.
    """
    head, samples = read_samples(params, feats, labels, loss, weights, tile_size)
    return _summed_curvature(head, samples, loss, tile_size).relative_flatness()


@metric
def simplified_relative_flatness(
    params: HeadParams,
    feats: Features,
    labels: Labels,
    weights: Weights | None = None,
    *,
    loss: Loss = "softmax_cross_entropy",
    tile_size: int | None = None,
) -> Float[Array, ""]:
    """Simplified relative flatness κ̂ of a linear head, a bound κ ≤ κ̂ where the loss is convex in the logits.

        κ̂ = ‖W‖_F² · Tr H

    It is what experiments often report as relative flatness. Unlike κ it changes when the same vector is added to
    every row of W, which a softmax does not notice.

    Args and errors are those of `relative_flatness`. The return value is as there, κ̂ in the place of κ, in the same
    unit.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import simplified_relative_flatness
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -2.0]])}
        >>> feats, labels = jnp.array([[1.0], [-1.0]]), jnp.array([0, 2])
        >>> print(f"{simplified_relative_flatness(params, feats, labels):.4f}")
        1.8770

    References:
        Adilova, Abourayya, Li, Dada, Petzka, Egger, Kleesiek, Kamp: *FAM: Relative Flatness Aware Minimization*, 2023.
    """
    head, samples = read_samples(params, feats, labels, loss, weights, tile_size)
    return _summed_curvature(head, samples, loss, tile_size).simplified_flatness()


@metric
def max_relative_flatness(
    params: HeadParams,
    feats: Features,
    labels: Labels,
    weights: Weights | None = None,
    *,
    loss: Loss = "softmax_cross_entropy",
) -> Float[Array, ""]:
    """Maximum-eigenvalue relative flatness κ_max of a linear head: larger is sharper.

        κ_max = Σ_s ‖w_s‖² λ_max(H_{s,s}),    H_{s,s} = E_i G_i[s, s] φ_i φ_iᵀ

    with λ_max the algebraically largest eigenvalue. It is exact: nothing is sampled.

    Args and errors are those of `relative_flatness`. The return value is as there, κ_max in the place of κ, in the same
    unit.

    Notes:
        The cost is d·m²·(n + O(m)), for d weighted Gram matrices and their eigenvalues, one (m, m) matrix at a time.
        Where the largest eigenvalue is repeated, the gradient is one of many. Where any eigenvalue is repeated, the
        second derivative may be NaN.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import max_relative_flatness
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -2.0]])}
        >>> feats, labels = jnp.array([[1.0], [-1.0]]), jnp.array([0, 2])
        >>> print(f"{max_relative_flatness(params, feats, labels):.4f}")
        0.5243

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021.
    """
    head, samples = read_samples(params, feats, labels, loss, weights)
    curvature = _curvature(head, samples, loss, unit_of(head))
    measures = curvature.shares[:, None] * curvature.diagonal()
    unit = unit_for(curvature.feats)
    feats = curvature.feats * unit

    def largest_eigenvalue(measure: Float[Array, " n"]) -> Float[Array, ""]:
        # An eigensolver squares what it is given: bring 1e-30 to 1 first.
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(measure)))
        flat = size == 0
        size = jnp.where(flat, 1, size)
        block = feats.T @ ((measure / size)[:, None] * feats)
        # Equal eigenvalues have no second derivative: a row without curvature takes no part.
        block = jnp.where(flat, jnp.diag(jnp.arange(len(block), dtype=block.dtype)), block)
        return jnp.where(flat, 0, size * jnp.linalg.eigvalsh(block)[-1])

    # In an order that keeps a small eigenvalue.
    row_norms = jnp.sum((curvature.head.weight / unit) ** 2, axis=1)
    return jnp.sum(row_norms * jax.lax.map(largest_eigenvalue, measures.T))


@metric
def row_block_traces(
    params: HeadParams,
    feats: Features,
    labels: Labels,
    weights: Weights | None = None,
    *,
    loss: Loss = "softmax_cross_entropy",
) -> Float[Array, "d d"]:
    """Traces T[s, s'] = Tr H_{s,s'} of the blocks of the Hessian that belong to two rows of W.

        T = E_i ‖φ_i‖² G_i,    κ = ⟨W Wᵀ, T⟩,    Tr H = Tr T

    Args and errors are those of `relative_flatness`.

    Returns:
        T (d, d), symmetric, in the unit of the loss over that of W squared; NaN where κ would be.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import row_block_traces
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -2.0]])}
        >>> feats, labels = jnp.array([[1.0], [-1.0]]), jnp.array([0, 2])
        >>> print(jnp.round(1e4 * row_block_traces(params, feats, labels)))
        [[ 655. -518. -138.]
         [-518. 1035. -518.]
         [-138. -518.  655.]]

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021.
    """
    head, samples = read_samples(params, feats, labels, loss, weights)
    unit = unit_for(samples.feats)
    # Divided twice by the unit it would be divided by its square, which overflows.
    return _curvature(head, samples, loss, unit).block_traces() * (1 / unit) * (1 / unit)


def _summed_curvature(
    head: LinearHead, samples: Samples, loss: Loss, tile_size: int | None
) -> LogitCurvature | TiledSoftmaxCurvature:
    """The curvature where κ and κ̂ alone are asked for: of a large softmax head, without its logits."""
    if loss == "softmax_cross_entropy" and reads_in_tiles(head, len(samples.feats), tile_size):
        return TiledSoftmaxCurvature(head, samples.feats, samples.shares, tile_size)
    return _curvature(head, samples, loss, unit_of(head))


def _curvature(head: LinearHead, samples: Samples, loss: Loss, unit: Float[Array, ""]) -> LogitCurvature:
    """The curvature with the weights divided by `unit` and the features times it, so that no square overflows."""
    dtype = samples.feats.dtype
    unit = unit.astype(dtype)
    head = LinearHead(head.matrix.astype(dtype) / unit, head.bias.astype(dtype), head.rows_axis)
    feats = samples.feats * unit
    if callable(loss):
        return AutodiffCurvature(loss, head, feats, samples.labels, samples.shares)
    closed_form = {
        "softmax_cross_entropy": SoftmaxCurvature,
        "squared_error": squared_error,
        "sigmoid_cross_entropy": sigmoid_cross_entropy,
    }[loss]
    return closed_form(head, feats, samples.shares)
