"""Cross-entropy whose derivatives keep their digits however small it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flatjax.metric import metric


@metric(placed="as it comes")
def cross_entropy(logits: Float[Array, "*n d"], labels: Integer[Array, "*n"]) -> Float[Array, "*n"]:
    """Softmax cross-entropy of each sample, as a sum over the other classes.

        ℓ = log(1 + Σ_{s≠y} exp(z_s − z_y))

    Written as logsumexp(z) − z_y it is 0 in float32 once it is below 1e-7, and its second derivatives, which curvature
    and relative flatness of every layer are made of, are off by half: what the label's own logit adds to them is a
    difference of two numbers near 1. Here neither has to be taken, and automatic differentiation is right at 1e-30 too.

    Args:
        logits: z (..., d), d ≥ 2.
        labels: integer classes (...,).

    Returns:
        ℓ (...,) in nats, in the dtype of the logits. NaN for a label out of range, with all its derivatives; so for
        −100 too: of a batch with padding take `jnp.where(labels >= 0, cross_entropy(logits, labels.clip(0)), 0)`, and
        its sum over the number of the others.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = cross_entropy(jnp.array([[30.0, 0.0]]), jnp.array([0]))
        >>> print(f"{loss[0]:.3e}")
        9.358e-14
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    # Into the logits, as a loss that is NaN by choice has the derivative 0.
    logits = logits * jnp.where(jnp.any(is_label, axis=-1, keepdims=True), 1, jnp.nan).astype(logits.dtype)
    # Summed, not indexed: classes may be split among devices, and no label is then looked up where it is not.
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)
    margins = jnp.where(is_label, -jnp.inf, logits - of_label)
    return jax.nn.softplus(jax.nn.logsumexp(margins, axis=-1))
