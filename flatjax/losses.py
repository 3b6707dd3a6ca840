"""Cross-entropy whose derivatives keep their digits however small it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flatjax.core.arrays import one_number
from flatjax.core.dtypes import computing_dtype
from flatjax.core.metric import metric
from flatjax.core.sharding import automatic
from flatjax.samples import IGNORED_LABEL, Classes, Logits, Scalar, Targets, widened


@metric(placed="as it comes")
def cross_entropy(
    logits: Logits,
    labels: Classes | Targets,
    smoothing: Scalar = 0.0,
) -> Float[Array, "*n"]:
    """Softmax cross-entropy of each sample, as a sum over all classes but the likeliest.

        ℓ = −Σ_s t_s log p_s = Σ_s t_s (z_j − z_s) + (Σ_s t_s) log(1 + Σ_{s≠j} exp(z_s − z_j)),    z_j the largest

    Args:
        logits: z (..., d), of any floating dtype, the classes split among devices or not. A class with the logit −∞ is
            left out. If only one class is left, its loss is 0, and so are its derivatives.
        labels: integer classes (...,), or targets (..., d), probabilities t. If a sample's do not sum to 1 its loss is
            multiplied by their sum, as its part of κ is. The label −100 ignores its sample, as everywhere in flatjax.
        smoothing: α, from 0 to 1. All d classes have an equal part of it, those left out too:
            t = (1 − α) [s = y] + α/d.

    Returns:
        ℓ (...,) in nats, in float64 if the logits or the targets are, else in float32, whatever the logits are of.

        * 0, with all its derivatives, for an ignored sample, whatever its logits. The mean over the others is then the
          sum of all over their number, `jnp.sum(labels != -100)`.
        * +∞ where a class that is left out has a part in the targets.
        * NaN, with all its derivatives, for any other label out of range, a target that is negative or not finite, an
          α out of range, a logit that is NaN or +∞, or no class left.

    Raises:
        TypeError: the logits are not floating, or the labels neither integer classes nor floating targets.
        ValueError: shapes that do not fit.

    Notes:
        Written as logsumexp(z) − z_y the loss is 0 in float32 once it is below 1e-7. Its second derivatives are then
        off by half, as what the label's own logit adds to them is a difference of two numbers near 1. Curvature and
        relative flatness of every layer are made of these derivatives. Here no such difference is taken, and automatic
        differentiation is right at 1e-30 too.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import cross_entropy
        >>> loss = cross_entropy(jnp.array([[30.0, 0.0]]), jnp.array([0]))
        >>> print(f"{loss[0]:.3e}")
        9.358e-14
        >>> print(cross_entropy(jnp.zeros((3, 2)), jnp.array([1, -100, 2])).round(4))
        [0.6931 0.        nan]
    """
    if labels is None:
        raise TypeError("labels is None, wanted integer classes (...,) or targets (..., d)")
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    is_ignored, is_good, targets = _targets(logits, labels)
    smoothing = one_number("smoothing", smoothing).astype(targets.dtype)
    # The loss lies as the samples do, and where the classes lie is the compiler's to choose.
    compute = automatic(_losses, like=jnp.max(logits, axis=-1))
    return compute(logits, targets, is_ignored, is_good, smoothing)


def _losses(
    logits: Float[Array, "*n d"],
    targets: Float[Array, "*n d"],
    is_ignored: Bool[Array, "*n"],
    is_good: Bool[Array, "*n"],
    smoothing: Float[Array, ""],
) -> Float[Array, "*n"]:
    targets = (1 - smoothing) * targets + smoothing / logits.shape[-1]
    logits = jnp.where(is_ignored[..., None], 0, logits.astype(targets.dtype))
    is_good &= (smoothing >= 0) & (smoothing <= 1) & ~jnp.any(logits == jnp.inf, axis=-1)
    # Into the logits, as a loss that is NaN by choice has the derivative 0.
    logits = logits * jnp.where(is_good | is_ignored, 1, jnp.nan).astype(logits.dtype)[..., None]
    relative, others = relative_to_largest(logits)
    relative = jnp.where((targets == 0) & (relative == -jnp.inf), 0, relative)
    losses = jnp.sum(targets, axis=-1) * jnp.log1p(others[..., 0]) - jnp.sum(targets * relative, axis=-1)
    return jnp.where(is_ignored, 0, losses)


def relative_to_largest(logits: Float[Array, "*n d"]) -> tuple[Float[Array, "*n d"], Float[Array, "*n 1"]]:
    """All that a softmax is made of, near certainty too: z_s − z_j, and the sum of their exponentials over s ≠ j."""
    is_largest = is_first_largest(logits)
    # Summed, not indexed: classes may be split among devices, and none is then looked up where it is not.
    relative = logits - jnp.sum(jnp.where(is_largest, logits, 0), axis=-1, keepdims=True)
    # What the largest is relative to itself has no derivative: were it taken from itself, digits would go with it.
    relative = jnp.where(is_largest, jax.lax.stop_gradient(relative), relative)
    return relative, jnp.sum(jnp.where(is_largest, 0, jnp.exp(relative)), axis=-1, keepdims=True)


def is_first_largest(logits: Float[Array, "*n d"]) -> Bool[Array, "*n d"]:
    """Marks the largest logit, the first if there are several.

    It takes two reductions that XLA vectorises on a CPU, where it does not vectorise argmax.
    """
    places = jnp.arange(logits.shape[-1]).reshape(*[1] * (logits.ndim - 1), -1)
    is_largest = logits == jnp.max(jax.lax.stop_gradient(logits), axis=-1, keepdims=True)
    return places == jnp.min(jnp.where(is_largest, places, places.size), axis=-1, keepdims=True)


def _targets(
    logits: Float[Array, "*n d"], labels: Array
) -> tuple[Bool[Array, "*n"], Bool[Array, "*n"], Float[Array, "*n d"]]:
    """Finds which samples are ignored, which have good labels, and the targets of all."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits has dtype {logits.dtype}, wanted a floating dtype")
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits has shape {logits.shape}, wanted (..., d), one a class")
    leading = logits.shape[:-1]
    if labels.shape not in (leading, logits.shape):
        raise ValueError(
            f"labels has shape {labels.shape}, wanted classes {leading} or targets {logits.shape}, as logits has "
            f"{logits.shape}"
        )
    is_of_classes = labels.shape == leading
    if not jnp.issubdtype(labels.dtype, jnp.integer if is_of_classes else jnp.floating):
        raise TypeError(
            f"labels has dtype {labels.dtype} and shape {labels.shape}, wanted integer classes {leading} "
            f"(labels.astype(int)) or floating targets {logits.shape} (labels.astype(float))"
        )
    if is_of_classes:
        labels = widened(labels)
        is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        return labels == IGNORED_LABEL, jnp.any(is_label, axis=-1), is_label.astype(computing_dtype(logits))
    targets = labels.astype(computing_dtype((logits, labels)))
    is_good = jnp.all((targets >= 0) & jnp.isfinite(targets), axis=-1)
    return jnp.zeros_like(is_good), is_good, targets
