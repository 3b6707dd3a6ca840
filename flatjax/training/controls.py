"""Losses that hold confidence down by themselves: what a regulariser by flatness has to be compared with."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from flatjax.curvature.vectors import sum_dtype


def confidence_penalty(logits: Float[ArrayLike, "*n d"]) -> Float[Array, "*n"]:
    """The negative entropy of each prediction, to be added to the loss with a positive strength.

        −H(p) = Σ_s p_s log p_s,    p = softmax(z)

    From −log d, where all classes are as likely, to 0; a sum over all but the likeliest class, so that it keeps its
    digits, and its gradient p_s (log p_s + H) too, as confidence grows.

    Args:
        logits: z (..., d). A class with the logit −∞ is left out.

    Returns:
        −H (...,) in nats, in float64 if the logits are, else in float32. NaN where a logit is NaN or +∞.

    Example:
        >>> import jax.numpy as jnp
        >>> for penalty in confidence_penalty(jnp.array([[0.0, 0.0], [30.0, 0.0]])):
        ...     print(f"{penalty:.4e}")
        -6.9315e-01
        -2.9009e-12

    References:
        Pereyra, Tucker, Chorowski, Kaiser, Hinton: *Regularizing Neural Networks by Penalizing Confident Output
        Distributions*, 2017.
    """
    log_p = _log_probabilities(jnp.asarray(logits))
    # What is left out is so before the product, whose derivative would be that of 0 log 0.
    return jnp.sum(jnp.exp(log_p) * jnp.where(log_p == -jnp.inf, 0, log_p), axis=-1)


def label_smoothing(
    logits: Float[ArrayLike, "*n d"], labels: Integer[ArrayLike, "*n"], smoothing: ArrayLike
) -> Float[Array, "*n"]:
    """Softmax cross-entropy with labels of which a part is spread over all d classes alike, the right one included.

        ℓ = −Σ_s ((1 − α) [s = y] + α/d) log p_s,    p = softmax(z)

    With the labels of `optax.smooth_labels`, in float32 at least. At α = 0 it is `flatjax.cross_entropy`, and keeps its
    digits as that does.

    Args:
        logits: z (..., d). A class with the logit −∞ has no part where α = 0 and it is not the label; else ℓ is +∞.
        labels: integer classes (...,).
        smoothing: α, from 0, where it is cross-entropy, to 1.

    Returns:
        ℓ (...,) in nats, in float64 if the logits are, else in float32. NaN for a label or α out of range; not finite
        where a logit is NaN or +∞.

    Example:
        >>> import jax.numpy as jnp
        >>> for loss in label_smoothing(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 7]), 0.1):
        ...     print(f"{loss:.4f}")
        0.2269
        nan

    References:
        Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: *Rethinking the Inception Architecture*, CVPR 2016.
    """
    log_p, labels = _log_probabilities(jnp.asarray(logits)), jnp.asarray(labels)
    smoothing = jnp.asarray(smoothing, log_p.dtype)
    one_hot = jax.nn.one_hot(labels, log_p.shape[-1], dtype=log_p.dtype)
    targets = optax.smooth_labels(one_hot, smoothing)
    is_valid = jnp.any(one_hot > 0, axis=-1, keepdims=True) & (smoothing >= 0) & (smoothing <= 1)
    # Into the logarithms, as a loss that is NaN by choice has the derivative 0.
    log_p = log_p * jnp.where(is_valid, 1, jnp.nan).astype(log_p.dtype)
    return -jnp.sum(targets * jnp.where((targets == 0) & (log_p == -jnp.inf), 0, log_p), axis=-1)


def _log_probabilities(logits: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """log softmax(z), that of the likeliest class by the sum of the others: so it keeps its digits near 0."""
    logits = logits.astype(sum_dtype(logits))
    is_largest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    relative = logits - jnp.sum(jnp.where(is_largest, logits, 0), axis=-1, keepdims=True)
    # What the largest is relative to itself has no derivative: were it taken from itself, digits would go with it.
    relative = jnp.where(is_largest, jax.lax.stop_gradient(relative), relative)
    # The largest counts as the 1 of log1p, to which it may add no rounding error.
    others = jnp.sum(jnp.where(is_largest, 0, jnp.exp(relative)), axis=-1, keepdims=True)
    return relative - jnp.log1p(others)
