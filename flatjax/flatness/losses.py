"""From a head, its samples and a loss to the logit-space curvature that every flatness metric is made of."""

from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from flatjax.flatness.autodiff import AutodiffCurvature
from flatjax.flatness.separable import SeparableCurvature, sigmoid_cross_entropy, squared_error
from flatjax.flatness.softmax import SoftmaxCurvature
from flatjax.heads import HeadParams, LinearHead, linear_head
from flatjax.samples import Samples, check_class_labels, check_features, flatten_samples, void_where

Loss = Literal["softmax_cross_entropy", "squared_error", "sigmoid_cross_entropy"] | Callable[[Array, Array], Array]
"""A named loss, or any `(logits (d,), label) -> scalar`."""


LogitCurvature = SoftmaxCurvature | SeparableCurvature | AutodiffCurvature
"""The Hessians G_i (d, d) of a loss in the logits, and their sums over samples of shares e_i."""


def logit_curvature(
    params: HeadParams, feats: ArrayLike, labels: ArrayLike, loss: Loss, weights: ArrayLike | None
) -> LogitCurvature:
    """Reads and checks what a public metric is given.

    Raises:
        TypeError: `loss` is neither a name nor a callable; labels of one class a sample are not integers.
        ValueError: `loss` is an unknown name, or `labels` does not fit the outputs.
    """
    head, samples = flatten_samples(linear_head(params), feats, labels, weights)
    samples = check_features(samples)
    if callable(loss):
        return AutodiffCurvature(loss, head, *samples)
    match loss:
        case "softmax_cross_entropy":
            samples = _check_labels(samples, head)
            if samples.labels.ndim == 2:
                # The targets enter the Hessian through their sum alone: ℓ = Σ_s y_s (logsumexp z − z_s).
                mass = jnp.sum(samples.labels, axis=1)
                negative = jnp.any(samples.labels < 0, axis=1)
                shares = void_where(negative, samples.shares * mass, "labels[{i}] has a negative probability")
                samples = samples._replace(shares=shares)
            return SoftmaxCurvature(head, samples.feats, samples.shares)
        case "squared_error":
            samples = _check_labels(samples, head)
            return squared_error(head, samples.feats, samples.shares)
        case "sigmoid_cross_entropy":
            if samples.labels.ndim == 1 and len(head.weight) == 1:
                raise ValueError(
                    f"labels has shape {jnp.shape(labels)}, which names one of 1 classes; wanted the binary targets "
                    "of the one output: labels[..., None]"
                )
            samples = _check_labels(samples, head)
            return sigmoid_cross_entropy(head, samples.feats, samples.shares)
        case str():
            raise ValueError(
                f"loss is {loss!r}, wanted 'softmax_cross_entropy', 'squared_error', 'sigmoid_cross_entropy', or a "
                "callable (logits (d,), label) -> scalar"
            )
    raise TypeError(f"loss is a {type(loss).__name__}, wanted a name or a callable (logits (d,), label) -> scalar")


def _check_labels(samples: Samples, head: LinearHead) -> Samples:
    """Class indices (n,), or targets (n, d), are what the named losses take."""
    labels, num_outputs = samples.labels, len(head.weight)
    if labels.ndim == 1:
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(
                f"labels has dtype {labels.dtype} and one entry a sample, wanted integer classes, or targets of shape "
                f"(..., {num_outputs})"
            )
        return check_class_labels(samples, num_outputs)
    if labels.shape[1] != num_outputs:
        raise ValueError(
            f"labels has {labels.shape[1]} targets a sample, but the head has {num_outputs} outputs: wanted integer "
            f"classes (...,), or targets (..., {num_outputs})"
        )
    targets = labels.astype(samples.feats.dtype)
    finite = jnp.all(jnp.isfinite(targets), axis=1)
    shares = void_where(~finite, samples.shares, "labels[{i}] has a target that is not finite")
    return samples._replace(labels=targets, shares=shares)
