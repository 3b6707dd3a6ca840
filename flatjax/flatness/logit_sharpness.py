"""Measure how much softmax cross-entropy rises under the worst change of the logits within a box around them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flatjax.core import results
from flatjax.core.metric import metric
from flatjax.core.sharding import varying_like
from flatjax.flatness.frame import frame_of, unit_of
from flatjax.flatness.inputs import check_tile_size
from flatjax.flatness.parts import map_parts, split
from flatjax.flatness.tiled.other_outputs import OtherOutputs
from flatjax.flatness.tiled.readout import FEWEST_ROWS, LOGITS_AT_ONCE
from flatjax.flatness.tiled.tiles import rows_of, tile, tile_indices
from flatjax.heads import HeadParams, LinearHead, linear_head
from flatjax.samples import (
    Classes,
    Features,
    Logits,
    Samples,
    Weights,
    check_one_class_a_sample,
    flatten_samples,
    mark_class_labels,
)


class LogitSharpness(NamedTuple):
    """The result of `logit_sharpness`: means over the samples, in nats but for the last."""

    rise: Float[Array, ""]
    """The mean rise E [max ℓ(z + δ) − ℓ(z)], 0 or more."""
    loss: Float[Array, ""]
    """The mean loss E ℓ(z)."""
    relative: Float[Array, ""]
    """The ratio 100 · rise / (1 + loss), the form in which sharpness over a box is often published."""

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def logit_sharpness(
    logits: Logits,
    labels: Classes,
    weights: Weights | None = None,
    *,
    radius: float = 1e-3,
) -> LogitSharpness:
    r"""The rise of softmax cross-entropy under the worst δ with |δ_j| ≤ ε(|z_j| + 1), in closed form.

        max_δ ℓ(z + δ) is at z_j + ε(|z_j| + 1) for j ≠ y, and z_y − ε(|z_y| + 1)

    The rise depends only on the logits and the labels: on the margins and on how large the logits are. It does not
    depend on the weights of a network or their curvature. Unlike the loss, it changes when the same number is added to
    all logits of a sample.

    Args:
        logits: z (..., d), d ≥ 2. The mean is over all of the leading shape. An output of −∞ is left out.
        labels: integer classes (...,). A sample of the label −100 is padding, whatever it holds.
        weights: sample weights (...,), 1 by default; 0 is padding. The derivative in a weight that is 0 is right too,
            but 0 where the label is −100 or the sample holds a bad value.
        radius: ε ≥ 0. Static.

    Returns:
        A `LogitSharpness`, in float64 if any input is, else in float32. It is NaN if a logit is NaN or +∞, a label out
        of range, or a weight negative. If the label names an output that is left out, the loss is infinite and the rise
        NaN.

    Raises:
        TypeError: the logits are not floating, the labels not one integer a sample, or the weights not real.
        ValueError: shapes that do not fit, no sample, or a negative radius.

    Notes:
        The rise is summed from what does not cancel, so that it keeps its digits however small ε or the loss is.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import logit_sharpness
        >>> sharpness = logit_sharpness(jnp.array([[2.0, 0.0, -1.0]], jnp.float32), jnp.array([0]), radius=0.01)
        >>> print(f"{sharpness.rise:.5f} {sharpness.loss:.5f} {sharpness.relative:.4f}")
        0.00679 0.16985 0.5805

    References:
        Lee, Bae, Kim, Kwon, Lee: *To FP8 and Back Again: Quantifying Reduced Precision Effects on LLM Training
        Stability*, 2024.
        Keskar, Mudigere, Nocedal, Smelyanskiy, Tang: *On Large-Batch Training for Deep Learning*, ICLR 2017 (the box).
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits has dtype {logits.dtype}, wanted a floating dtype")
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(f"logits has shape {logits.shape}, wanted (..., d), d at least 2")
    num_outputs = logits.shape[-1]
    # A head of one feature stands for those who have none: what is checked of it is the leading shape.
    head = LinearHead(jnp.zeros((num_outputs, 1), logits.dtype), jnp.zeros(num_outputs, logits.dtype))
    samples = _read(head, jnp.zeros((*logits.shape[:-1], 1), logits.dtype), labels, weights, radius)
    logits = logits.astype(samples.feats.dtype).reshape(-1, num_outputs)
    is_bad = jnp.any(jnp.isnan(logits) | (logits == jnp.inf), axis=1)
    logits = jnp.where((samples.counts | ~is_bad)[:, None], logits, 0)
    samples = samples.marked(is_bad, "logits[{i}] holds a NaN or an infinity")

    outputs = jnp.arange(num_outputs, dtype=samples.labels.dtype)
    is_label = outputs[None, :] == samples.labels[:, None]
    # Summed, not indexed: outputs may be split among devices.
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=1)
    offset = jnp.zeros_like(of_label)
    others = OtherOutputs.none(of_label).with_logits(logits, offset, is_label, radius)
    return _means(samples, *others.rise_and_loss(of_label, offset, radius))


@metric
def head_logit_sharpness(
    params: HeadParams,
    feats: Features,
    labels: Classes,
    weights: Weights | None = None,
    *,
    radius: float = 1e-3,
    tile_size: int | None = None,
) -> LogitSharpness:
    """Measures the `logit_sharpness` of a linear head, whose logits are never all in memory.

    Args:
        params: the head, as for `relative_flatness`.
        feats: features (..., m), what enters the head.
        labels: integer classes (...,). A sample of the label −100 is padding, whatever it holds.
        weights: sample weights (...,), 1 by default; 0 is padding. The derivative in a weight that is 0 is right too,
            but 0 where the label is −100 or the sample holds a bad value.
        radius: ε ≥ 0. Static.
        tile_size: how many rows of W are read at a time. Static. Chosen by the shapes if None.

    Returns:
        A `LogitSharpness`; NaN also where the head is not finite, but for a bias of −∞, which leaves its output out.

    Raises:
        TypeError, ValueError: as `cross_entropy_and_flatness`; and for a negative radius.

    Notes:
        The cost is one product of matrices, n·d·m, in tiles of rows. On a mesh each device reads the rows it holds. The
        result is differentiable, and its gradient makes the logits again.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.flatness.logit_sharpness import head_logit_sharpness
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -1.0]], jnp.float32)}
        >>> feats, labels = jnp.ones((1, 1), jnp.float32), jnp.array([0])
        >>> print(f"{head_logit_sharpness(params, feats, labels, radius=0.01, tile_size=2).rise:.5f}")
        0.00679
    """
    check_tile_size(tile_size)
    head = linear_head(params)
    samples = _read(head, feats, labels, weights, radius)
    feats, labels = samples.feats, samples.labels
    parts = split(head, (), feats)
    frame = frame_of(parts, feats, unit_of(head))
    offset = feats @ frame.row + frame.bias
    feats = feats * frame.unit
    if tile_size is None:
        tile_size = max(FEWEST_ROWS, len(parts.bias) * LOGITS_AT_ONCE // len(feats))
    size = min(-(-int(tile_size) // len(parts.bias)), parts.num_rows)
    bias = jnp.take(head.bias, jnp.clip(labels, 0, head.num_outputs - 1)).astype(feats.dtype)
    of_label = jnp.sum(rows_of(head, frame, labels) * feats, axis=1) + (bias - frame.bias)
    nothing = varying_like(OtherOutputs.none(of_label), (parts, feats, labels))

    def of_part(head: LinearHead, first_output: Array) -> OtherOutputs:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(others: OtherOutputs, i: Array) -> tuple[OtherOutputs, None]:
            read = tile(head, frame, feats, first_output, size, i)
            return others.with_logits(read.logits, offset, read.is_output(labels), radius), None

        return jax.lax.scan(step, nothing, tile_indices(head, size, labels.dtype))[0]

    others = OtherOutputs.merged(map_parts(of_part, (parts,), parts.first_outputs(labels.dtype)))
    return _means(samples, *others.rise_and_loss(of_label, offset, radius))


def _read(head: LinearHead, feats: ArrayLike, labels: ArrayLike, weights: ArrayLike | None, radius: float) -> Samples:
    if radius < 0:
        raise ValueError(f"radius is {radius}, wanted 0 or more")
    samples = flatten_samples(head, feats, labels, weights, unit=unit_of(head))
    check_one_class_a_sample(samples, labels)
    return mark_class_labels(samples, head.num_outputs)


def _means(samples: Samples, rise: Float[Array, " n"], loss: Float[Array, " n"]) -> LogitSharpness:
    rise, loss = samples.mean(rise), samples.mean(loss)
    return LogitSharpness(rise, loss, 100 * rise / (1 + loss))
