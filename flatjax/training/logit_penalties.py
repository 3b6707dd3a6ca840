"""Losses that hold confidence down by themselves: what a regulariser by flatness has to be compared with."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.core.dtypes import computing_dtype
from flatjax.losses import cross_entropy, relative_to_largest
from flatjax.samples import Classes, Logits, Scalar, Targets


def confidence_penalty(logits: Logits) -> Float[Array, "*n"]:
    """The negative entropy of each prediction, to be added to the loss with a positive strength.

        −H(p) = Σ_s p_s log p_s,    p = softmax(z)

    It goes from −log d, where all classes are as likely, to 0.

    Args:
        logits: z (..., d). A class with the logit −∞ is left out.

    Returns:
        −H (...,) in nats, in float64 if the logits are, else in float32. NaN where a logit is NaN or +∞.

    Notes:
        It is summed over all but the likeliest class. So it keeps its digits as confidence grows, and so does its
        gradient p_s (log p_s + H).

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
    logits: Logits,
    labels: Classes | Targets,
    smoothing: Scalar,
) -> Float[Array, "*n"]:
    """Softmax cross-entropy with smoothed labels: a part is spread over all d classes alike, the right one included.

        ℓ = −Σ_s ((1 − α) [s = y] + α/d) log p_s,    p = softmax(z)

    It is `flatjax.cross_entropy` with its third argument, and ends as that does in all cases; both keep their digits.

    Args:
        logits: z (..., d). A class with the logit −∞ has no part where α = 0 and it is not the label; else ℓ is +∞.
        labels: integer classes (...,), or targets (..., d). The label −100 ignores its sample.
        smoothing: α, from 0, where it is cross-entropy, to 1.

    Returns:
        ℓ (...,) in nats, in float64 if the logits are, else in float32. It is 0 for an ignored sample. It is NaN for
        any other label or α out of range, and where a logit is NaN or +∞.

    Example:
        >>> import jax.numpy as jnp
        >>> for loss in label_smoothing(jnp.array([[2.0, 0.0], [2.0, 0.0]]), jnp.array([0, 7]), 0.1):
        ...     print(f"{loss:.4f}")
        0.2269
        nan

    References:
        Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: *Rethinking the Inception Architecture*, CVPR 2016.
    """
    return cross_entropy(logits, labels, smoothing)


def _log_probabilities(logits: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """log softmax(z); the likeliest class gets it from the sum of the others, so that it keeps its digits near 0."""
    relative, others = relative_to_largest(logits.astype(computing_dtype(logits)))
    return relative - jnp.log1p(others)
