"""Feature robustness: how much the loss rises when the features of all samples are perturbed by one random matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Shaped

from flatjax.core.arrays import a_key, one_number
from flatjax.core.metric import metric
from flatjax.curvature.estimate import Estimate, mean_of
from flatjax.flatness.frame import framed
from flatjax.flatness.inputs import Loss, read_samples
from flatjax.heads import HeadParams
from flatjax.samples import Features, Labels, Scalar, Weights


@metric
def feature_robustness(
    params: HeadParams,
    feats: Features,
    labels: Labels,
    delta: Scalar,
    key: Key[Array, ""],
    weights: Weights | None = None,
    *,
    distribution: str = "orthogonal",
    num_samples: int = 64,
    loss: Loss = "softmax_cross_entropy",
) -> Estimate:
    r"""Feature robustness E_F(δ) of a linear head: the mean rise of its loss under random changes of the features.

        E_F(δ) = E_A Σ_i ω_i [ℓ(W(φ_i + δ A φ_i) + b, y_i) − ℓ(W φ_i + b, y_i)] / Σ_i ω_i

    with A (m, m) drawn anew for each of `num_samples` and the same for all features. Each A is used with both signs, so
    that odd powers of δ cancel. As W(φ + δ A φ) = (W + δ W A) φ, this is also the rise under such changes of the
    weights. Relative flatness is what is left of it as δ goes to 0:

        E_F(δ) = κ δ²/(2m) + O(δ⁴) for orthogonal A,    κ δ²/2 + O(δ⁴) for normal A

    Args:
        params: the head, as for `relative_flatness`.
        feats: features (..., m), what enters the head. Any leading shape; the mean is over all of it.
        labels: integer classes (...,), or targets (..., d).
        delta: δ, the size of the change relative to the features.
        key: the random key of the draws.
        weights: sample weights ω (...,), all 1 by default. A sample of weight 0, or of the class −100, is padding. The
            derivative in a weight that is 0 is as for `relative_flatness`.
        distribution: how A is drawn: "orthogonal", uniformly from the orthogonal matrices, or "normal", with
            independent entries of variance 1. Static.
        num_samples: how many draws, each used with both signs; at least 2. Static.
        loss: as for `relative_flatness`. Static.

    Returns:
        An `Estimate`: value and standard_error in the unit of the loss, and num_probes, the number of draws. It is NaN
        where `relative_flatness` is.

    Raises:
        ValueError: an unknown distribution, or fewer than 2 samples; and as `relative_flatness`.

    Notes:
        The rise is summed from what does not cancel. For the named losses it therefore keeps its digits however small
        δ and the loss are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import feature_robustness, relative_flatness
        >>> params = {"kernel": jnp.array([[2.0, 0.0, -2.0], [1.0, -1.0, 0.0]], jnp.float32)}
        >>> feats, labels = jnp.array([[1.0, 0.0], [-1.0, 1.0]], jnp.float32), jnp.array([0, 2])
        >>> delta, num_features = 1e-3, 2
        >>> rise = feature_robustness(params, feats, labels, delta=delta, key=jax.random.key(0), num_samples=1000)
        >>> scale = 2 * num_features / delta**2
        >>> kappa = relative_flatness(params, feats, labels)
        >>> print(f"{kappa:.3f}", bool(abs(scale * rise.value - kappa) < 4 * scale * rise.standard_error))
        1.451 True

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021.
    """
    if distribution not in ("orthogonal", "normal"):
        raise ValueError(f"distribution is {distribution!r}, wanted 'orthogonal' or 'normal'")
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, wanted at least 2: of one there is no standard error")
    a_key(key)
    size = one_number("delta", delta)
    head, samples = read_samples(params, feats, labels, loss, weights)
    num_features, dtype = head.num_features, samples.feats.dtype
    size, head = size.astype(dtype), head.astype(dtype)
    if loss == "softmax_cross_entropy":
        head = framed(head, samples.feats)
    logits = head.logits(samples.feats)
    rise = _RISES[loss] if isinstance(loss, str) else _rise_of(loss, samples.labels)

    def draw(key: Key[Array, ""]) -> Float[Array, ""]:
        if distribution == "orthogonal":
            matrix = jax.random.orthogonal(key, num_features, dtype=dtype)
        else:
            matrix = jax.random.normal(key, (num_features, num_features), dtype)
        change = size * (samples.feats @ (head.weight @ matrix).T)
        return samples.mean(rise(logits, change))

    return mean_of(jax.lax.map(draw, jax.random.split(key, num_samples)))


def _of_softmax(logits: Float[Array, "n d"], change: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The rise ½ log Σp e^Δ + ½ log Σp e^−Δ, with Δ less that of the largest logit, j.

    The sums are 1 + a and 1 + b: what is large, p_j, adds nothing to a and b. a + b = 4 Σ p sinh²(Δ/2) has one sign.
    """
    p = jax.nn.softmax(logits, axis=1)
    j = jnp.argmax(logits, axis=1)[:, None]
    change = change - jnp.take_along_axis(change, j, axis=1)
    small = jnp.clip(change, -_LARGEST, _LARGEST)
    a, b = jnp.sum(p * jnp.expm1(small), axis=1), jnp.sum(p * jnp.expm1(-small), axis=1)
    of_small = jnp.log1p(4 * jnp.sum(p * jnp.sinh(small / 2) ** 2, axis=1) + a * b) / 2
    log_p = jax.nn.log_softmax(logits, axis=1)
    of_large = sum(jax.nn.logsumexp(log_p + sign * change, axis=1) for sign in (1, -1)) / 2
    return jnp.where(jnp.max(jnp.abs(change), axis=1) <= _LARGEST, of_small, of_large)


def _of_sigmoid(logits: Float[Array, "n d"], change: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The rise ½ Σ_s log(1 + 4 σ(z_s) σ(−z_s) sinh²(Δ_s/2))."""
    small = jnp.clip(change, -_LARGEST, _LARGEST)
    of_small = jnp.log1p(4 * jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * jnp.sinh(small / 2) ** 2)
    large = jnp.maximum(jnp.abs(change), _LARGEST)  # where 4 sinh²(Δ/2) is e^|Δ| to all digits
    of_large = jax.nn.softplus(jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits) + large)
    return jnp.sum(jnp.where(jnp.abs(change) <= _LARGEST, of_small, of_large), axis=1) / 2


_LARGEST = 40.0
"""The largest change whose exponentials can be multiplied in float32."""


def _of_squares(logits: Float[Array, "n d"], change: Float[Array, "n d"]) -> Float[Array, " n"]:
    """The rise ½ ‖Δ‖² of squared error."""
    return jnp.sum(change**2, axis=1) / 2


_RISES = {"softmax_cross_entropy": _of_softmax, "sigmoid_cross_entropy": _of_sigmoid, "squared_error": _of_squares}
"""Functions for ½ [ℓ(z + Δ) + ℓ(z − Δ)] − ℓ(z), which is the same whatever the label."""


def _rise_of(
    loss: Callable[[Array, Array], Array], labels: Shaped[Array, "n ..."]
) -> Callable[[Float[Array, "n d"], Float[Array, "n d"]], Float[Array, " n"]]:
    """Makes the same function for any loss."""

    def rise(logits: Float[Array, "n d"], change: Float[Array, "n d"]) -> Float[Array, " n"]:
        each = jax.vmap(loss)
        return (each(logits + change, labels) + each(logits - change, labels)) / 2 - each(logits, labels)

    return rise
