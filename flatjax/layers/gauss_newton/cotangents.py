"""Draw cotangents of the logits at random, so that their covariance is the Hessian G of the loss in the logits."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.curvature.vectors import random_signs
from flatjax.losses import is_first_largest, relative_to_largest

Loss = str | Callable[..., Any]
"""The name of a loss, or `(logits (..., d), *batch) -> (...,)`, each entry a convex function of its own logits."""


def cotangents(loss: Loss, logits: Float[Array, "*n d"], batch: tuple[Any, ...], key: Key[Array, ""]) -> Array:
    """Draws u (..., d) with E u = 0 and E u uᵀ = G, independent over samples.

    They are functions of the logits, to be differentiated, but for a loss that is a callable: what is drawn for it has
    no derivative. It is NaN where that loss is not convex.
    """
    logits = logits.astype(computing_dtype(logits))
    if callable(loss):
        return jax.lax.stop_gradient(_of_callable(loss, logits, batch, key))
    return NAMED[loss](logits, random_signs(key, logits.shape, logits.dtype))


def _softmax(logits: Float[Array, "*n d"], signs: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """u = √p ⊙ ξ − p ⟨√p, ξ⟩, of which the likeliest class gets what makes the sum 0.

    Its own entry is a difference of numbers near 1 where the loss is small.
    """
    relative, others = relative_to_largest(logits)
    is_largest = is_first_largest(logits)
    roots = jnp.exp((relative - jnp.log1p(others)) / 2)
    u = jnp.where(is_largest, 0, roots * signs - roots**2 * jnp.sum(roots * signs, axis=-1, keepdims=True))
    return u - jnp.where(is_largest, jnp.sum(u, axis=-1, keepdims=True), 0)


def _squared_error(logits: Float[Array, "*n d"], signs: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """u = ξ: the loss is ‖z − y‖²/2. A logit that is not finite has no cotangent."""
    return signs + 0 * logits


def _sigmoid(logits: Float[Array, "*n d"], signs: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    """u = √(σ(1 − σ)) ⊙ ξ, from the logarithms of both factors, which keep their digits near 0 and 1."""
    return jnp.exp((jax.nn.log_sigmoid(logits) + jax.nn.log_sigmoid(-logits)) / 2) * signs


NAMED: dict[str, Callable[[Array, Array], Array]] = {
    "softmax_cross_entropy": _softmax,
    "squared_error": _squared_error,
    "sigmoid_cross_entropy": _sigmoid,
}


def check_loss(loss: Loss) -> None:
    """Raises a ValueError for a loss that there is not."""
    if not callable(loss) and loss not in NAMED:
        raise ValueError(f"loss is {loss!r}, wanted one of {', '.join(map(repr, NAMED))}, or a callable")


def _of_callable(
    loss: Callable[..., Any], logits: Float[Array, "*n d"], batch: tuple[Any, ...], key: Key[Array, ""]
) -> Float[Array, "*n d"]:
    """u = √G ξ, with G from d products of the Hessian of all samples at once, as each depends on its own logits."""

    def total(logits: Array) -> Array:
        losses = loss(logits, *batch)
        if losses.shape != logits.shape[:-1]:
            raise ValueError(f"loss returns the shape {losses.shape} for logits {logits.shape}, wanted one a sample")
        return jnp.sum(losses)

    def product(direction: Array) -> Array:
        return jax.jvp(jax.grad(total), (logits,), (jnp.broadcast_to(direction, logits.shape),))[1]

    hessian = jax.vmap(product, out_axes=-1)(jnp.eye(logits.shape[-1], dtype=logits.dtype))
    is_sound = jnp.all(jnp.isfinite(hessian), axis=(-2, -1), keepdims=True)
    eigenvalues, vectors = jnp.linalg.eigh(jnp.where(is_sound, hessian, 0))
    largest = jnp.max(jnp.abs(eigenvalues), axis=-1, keepdims=True)
    rounding = 32 * logits.shape[-1] * jnp.finfo(logits.dtype).eps * largest
    is_convex = jnp.all(eigenvalues >= -rounding, axis=-1, keepdims=True) & is_sound[..., 0]
    roots = jnp.sqrt(jnp.where(is_convex, jnp.clip(eigenvalues, min=0), jnp.nan))
    return jnp.einsum("...ck,...k->...c", vectors, roots * random_signs(key, logits.shape, logits.dtype))
