"""Reads and checks what a metric of flatness is given: a head, its samples and a loss."""

import numbers
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array
from typing_extensions import TypeAliasType

from flatjax.flatness.frame import unit_of
from flatjax.heads import HeadParams, LinearHead, linear_head
from flatjax.samples import IGNORED_LABEL, Samples, flatten_samples, mark_class_labels

NamedLoss = Literal["softmax_cross_entropy", "squared_error", "sigmoid_cross_entropy"]
Loss = TypeAliasType("Loss", NamedLoss | Callable[[Array, Array], Array])
"""A named loss, or any callable `(logits (d,), label) -> scalar`."""


def read_samples(
    params: HeadParams,
    feats: ArrayLike,
    labels: ArrayLike,
    loss: Loss,
    weights: ArrayLike | None,
    tile_size: int | None = None,
) -> tuple[LinearHead, Samples]:
    """Reads and checks what a public metric is given.

    Raises:
        TypeError: `loss` is neither a name nor a callable; labels of one class a sample are not integers.
        ValueError: `loss` is an unknown name or returns no scalar, or `labels` does not fit the outputs; or there is a
            `tile_size` below 1, or one of another loss than softmax cross-entropy.
    """
    if tile_size is not None and loss != "softmax_cross_entropy":
        raise ValueError(f"tile_size is {tile_size}, but only softmax_cross_entropy is read in tiles: leave it out")
    check_tile_size(tile_size)
    head = linear_head(params)
    # Of what a label means to a callable nothing is known.
    ignored_label = None if callable(loss) else IGNORED_LABEL
    samples = flatten_samples(head, feats, labels, weights, ignored_label=ignored_label, unit=unit_of(head))
    if callable(loss):
        logits = jax.typeof(head.bias.astype(samples.feats.dtype))
        shape = jax.eval_shape(loss, logits, jax.typeof(samples.labels[0])).shape
        if shape != ():
            raise ValueError(f"loss returns the shape {shape} for one sample's logits (d,) and label, wanted a scalar")
        return head, samples
    if not isinstance(loss, str):
        raise TypeError(f"loss is a {type(loss).__name__}, wanted a name or a callable (logits (d,), label) -> scalar")
    if loss not in get_args(NamedLoss):
        names = ", ".join(map(repr, get_args(NamedLoss)))
        raise ValueError(f"loss is {loss!r}, wanted {names}, or a callable (logits (d,), label) -> scalar")
    if loss == "sigmoid_cross_entropy" and samples.labels.ndim == 1 and head.num_outputs == 1:
        raise ValueError(
            f"labels has shape {jnp.shape(labels)}, which names one of 1 classes; wanted the binary targets of the "
            "one output: labels[..., None]"
        )
    samples = _mark_labels(samples, head.num_outputs)
    if loss == "softmax_cross_entropy" and samples.labels.ndim == 2:
        samples = samples.marked(jnp.any(samples.labels < 0, axis=1), "labels[{i}] has a negative probability")
        # The targets enter the Hessian through their sum alone: ℓ = Σ_s y_s (logsumexp z − z_s).
        samples = samples._replace(weights=samples.weights * jnp.sum(samples.labels, axis=1))
    return head, samples


def check_tile_size(tile_size: int | None) -> None:
    """Raises a TypeError for what is no integer, and a ValueError for one below 1."""
    if tile_size is None:
        return
    if not isinstance(tile_size, numbers.Integral) or isinstance(tile_size, bool):
        raise TypeError(
            f"tile_size is a {type(tile_size).__name__}, wanted a number of rows, static under jit, or None"
        )
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}, wanted at least 1 row, or None")


def _mark_labels(samples: Samples, num_outputs: int) -> Samples:
    """Checks that labels are what the named losses take: class indices (n,), or targets (n, d)."""
    labels = samples.labels
    if labels.ndim == 1:
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            wanted = f"integer classes (labels.astype(int)), or targets of shape (..., {num_outputs})"
            if num_outputs == 1:
                wanted = (
                    "labels[..., None] with loss='squared_error', or, of 0 and 1, 'sigmoid_cross_entropy', as the head "
                    "has one output"
                )
            raise TypeError(f"labels has dtype {labels.dtype} and one entry a sample, wanted {wanted}")
        return mark_class_labels(samples, num_outputs)
    if labels.shape[1] != num_outputs:
        raise ValueError(
            f"labels has {labels.shape[1]} targets a sample, but the head has {num_outputs} outputs: wanted integer "
            f"classes (...,), or targets (..., {num_outputs})"
        )
    samples = samples._replace(labels=labels.astype(samples.feats.dtype))
    finite = jnp.all(jnp.isfinite(samples.labels), axis=1)
    return samples.marked(~finite, "labels[{i}] has a target that is not finite")
