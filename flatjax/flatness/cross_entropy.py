"""Softmax cross-entropy and relative flatness in one pass, to train with either or both."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.core.metric import metric
from flatjax.core.sharding import axis_names, sum_over_devices, varying_axes
from flatjax.flatness.frame import unit_of
from flatjax.flatness.tiled.readout import read_out
from flatjax.heads import HeadParams, linear_head
from flatjax.samples import Classes, Features, Weights, check_one_class_a_sample, flatten_samples, mark_class_labels


@metric
def cross_entropy_and_flatness(
    params: HeadParams,
    feats: Features,
    labels: Classes,
    weights: Weights | None = None,
    *,
    tile_size: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Softmax cross-entropy of a linear head and its relative flatness κ, in one pass that never holds all logits.

        L = Σ_i ω_i (logsumexp z_i − z_{i,y_i}) / Σ_i ω_i,    κ = Σ_i ω_i ‖φ_i‖² v_i / Σ_i ω_i,    z_i = Wφ_i + b

    with v_i the variance of the rows of W under softmax(z_i). Both are differentiable in the parameters and the
    features, to any order and in both modes, so that `loss + strength * kappa` trains. The gradient is the whole one,
    third derivatives of the loss included, and reaches every layer before the head.

    Args:
        params: the head, as for `relative_flatness`, of any floating dtypes: products are summed in float32, or
            float64.
        feats: features (..., m), what enters the head.
        labels: integer classes (...,), of all rows, also where a device has only some of them. A sample of the label
            −100 is ignored, whatever it holds.
        weights: sample weights ω (...,), all 1 by default. A sample of weight 0 is ignored, whatever it holds. The
            derivative in a weight that is 0 is right too, but 0 where the label is −100 or a value is bad.
        tile_size: how many rows of W are read at a time, by all devices together, or in a `jax.shard_map` by each;
            static. Chosen by the shapes if None.
        axis_name: inside a `jax.shard_map`, the mesh axis or axes along which the rows of W are split, in the order of
            in_specs, or the samples; static. The types say which of the two it is. Both results are then those of all
            rows and all samples. Elsewhere leave it out: sharded arrays are read where they are, and a head split by
            rows is never gathered. Where every device holds the whole head, a `shard_map` is the better choice: its
            gradient is then summed over the devices once, not tile by tile, and takes less memory.

    Returns:
        (L, κ), scalars in nats, in float64 if any input is, else in float32. Both are NaN if a feature or the head is
        not finite, a label out of range, a weight negative, or all samples are ignored. A bias of −∞ is allowed, and
        leaves its output out. `flatjax.check_inputs` says where a value is bad.

    Raises:
        TypeError: `params` is no mapping, the features are not floating, the weights not real, or the labels not one
            integer a sample.
        ValueError: a missing kernel, shapes that do not fit, a `tile_size` below 1, or an `axis_name` along which
            neither the rows nor the samples are split, or both.

    Notes:
        Cost, in matrix products of size n·d·m: 2 for the values, 4 with the gradient of L, as many as without κ, and 7
        with the gradient of both. Beside these products the head is read once more for eight of the samples, to find
        the rows that matter.

        Memory is O(n·(m + t) + t·m) beside the arguments and the gradient, for tiles of t ≥ √d rows. It is the same for
        a Hessian-vector product by `jvp` of `grad`. A reverse pass over a derivative takes more than all logits do.

        Precision: in float32 both keep the digits that the logits have however certain the head is, and so do their
        gradients: at L = 1e-30 and κ = 1e-30 about five. Where samples hesitate between rows near to each other, κ
        loses some, as for `relative_flatness`, which κ equals.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import cross_entropy_and_flatness
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -2.0]]), "bias": jnp.zeros(3)}
        >>> feats, labels = jnp.array([[1.0], [-1.0]]), jnp.array([0, 2])
        >>> def objective(params):
        ...     loss, kappa = cross_entropy_and_flatness(params, feats, labels)
        ...     return loss + 0.1 * kappa, kappa
        >>> (total, kappa), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
        >>> print(f"{total - 0.1 * kappa:.4f} {kappa:.4f} {gradient['kernel'][0, 0]:.4f}")
        0.1429 0.6344 -0.0768

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021 (κ).
        Milakov, Gimelshein: *Online normalizer calculation for softmax*, 2018 (the running sums).
    """
    head = linear_head(params)
    row_axes, sample_axes = _split_by(axis_names(axis_name), head.matrix, feats)
    samples = flatten_samples(head, feats, labels, weights, unit=unit_of(head, row_axes))
    check_one_class_a_sample(samples, labels)
    num_outputs = head.num_outputs * jax.lax.axis_size(row_axes) if row_axes else head.num_outputs
    samples = mark_class_labels(samples, num_outputs)
    total_weight = sum_over_devices(samples.total_weight, sample_axes)
    samples = samples._replace(total_weight=jnp.where(jnp.isfinite(total_weight), total_weight, jnp.nan))

    readout = read_out(head, samples.feats, samples.labels, tile_size=tile_size, axis_names=row_axes)
    cross_entropy, kappa = samples.mean(readout.losses), samples.mean(readout.flatness)
    return sum_over_devices(cross_entropy, sample_axes), sum_over_devices(kappa, sample_axes)


def _split_by(axis_names: tuple[str, ...], matrix: Any, feats: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds which of the axes split the rows of the head, and which the samples.

    Raises:
        ValueError: an axis splits neither, or both.
    """
    matrix_axes, feats_axes = varying_axes(matrix), varying_axes(feats)
    for name in axis_names:
        if (name in matrix_axes) == (name in feats_axes):
            splits = "both the head and feats" if name in feats_axes else "neither the head nor feats"
            raise ValueError(
                f"the axis {name!r} of axis_name splits {splits}, wanted one of them: inside jax.shard_map, with its "
                "default check_vma=True, in_specs say what an axis splits; outside, leave axis_name out"
            )
    rows = tuple(name for name in axis_names if name in matrix_axes)
    return rows, tuple(name for name in axis_names if name in feats_axes)
