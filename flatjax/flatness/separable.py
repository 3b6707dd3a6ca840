"""Relative flatness under a loss that is a sum over the outputs: its logit-space Hessians G_i are diagonal."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.heads import LinearHead


class SeparableCurvature(NamedTuple):
    """Diagonal logit-space Hessians G_i = diag(g_i); sample i has the share e_i."""

    head: LinearHead
    feats: Float[Array, "n m"]
    shares: Float[Array, " n"]
    second_derivatives: Float[Array, "n d"]

    def relative_flatness(self) -> Float[Array, ""]:
        """κ = Σ_i e_i ‖φ_i‖² Σ_s g_is ‖w_s‖²."""
        return jnp.sum(self._measure() * (self.second_derivatives @ jnp.sum(self.head.weight**2, axis=1)))

    def block_traces(self) -> Float[Array, "d d"]:
        """T = Σ_i e_i ‖φ_i‖² diag(g_i)."""
        return jnp.diag(self._measure() @ self.second_derivatives)

    def simplified_flatness(self) -> Float[Array, ""]:
        """κ̂ = Σ_i e_i ‖φ_i‖² ‖W‖_F² Σ_s g_is, in an order that keeps a small g."""
        squared_norm = self.head.squared_norm(self.feats.dtype)
        return jnp.sum(squared_norm * self._measure() * jnp.sum(self.second_derivatives, axis=1))

    def diagonal(self) -> Float[Array, "n d"]:
        """The diagonals G_i[s, s] = g_is."""
        return self.second_derivatives

    def _measure(self) -> Float[Array, " n"]:
        return self.shares * jnp.sum(self.feats**2, axis=1)


def squared_error(head: LinearHead, feats: Float[Array, "n m"], shares: Float[Array, " n"]) -> SeparableCurvature:
    """The curvature of ½‖z − y‖²: g = 1, but NaN for a head that holds a NaN or an infinity."""
    second_derivative = jnp.where(head.is_finite, 1, jnp.nan).astype(feats.dtype)
    return SeparableCurvature(head, feats, shares, jnp.full((len(feats), head.num_outputs), second_derivative))


def sigmoid_cross_entropy(
    head: LinearHead, feats: Float[Array, "n m"], shares: Float[Array, " n"]
) -> SeparableCurvature:
    """The curvature of −Σ_s [y_s log σ(z_s) + (1 − y_s) log σ(−z_s)]: g = σ(z)σ(−z).

    It does not cancel as σ(1 − σ) does. g is 0 at −∞, an output that is left out, and NaN at +∞, where a network
    diverged.
    """
    logits = head.logits(feats)
    second_derivatives = jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits)
    return SeparableCurvature(head, feats, shares, jnp.where(logits == jnp.inf, jnp.nan, second_derivatives))
