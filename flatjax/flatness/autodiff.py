"""Relative flatness under any loss of the logits, by forward-over-reverse products in logit space.

T = Σ_i e_i ‖φ_i‖² ∇²ℓ_i(z_i) is the Hessian, at b = 0, of f(b) = Σ_i e_i ‖φ_i‖² ℓ_i(z_i + b). One jvp of ∇f along a
direction of logit space serves all samples and all features at once. A direction of weight space would serve one
weight.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from flatjax.core.units import unit_near
from flatjax.heads import LinearHead

_ELEMENTS_IN_FLIGHT = 2**24
"""How many logits a chunk of vmapped directions may have: memory does not grow with the number of directions."""


class AutodiffCurvature(NamedTuple):
    """The logit-space Hessians G_i = ∇²ℓ(z_i, y_i) of any loss ℓ; sample i has the share e_i."""

    loss: Callable[[Float[Array, " d"], Array], Float[Array, ""]]
    head: LinearHead
    feats: Float[Array, "n m"]
    labels: Shaped[Array, " n"] | Shaped[Array, "n k"]
    shares: Float[Array, " n"]

    def relative_flatness(self) -> Float[Array, ""]:
        """κ = ⟨W Wᵀ, T⟩, or Σ_k w_kᵀ T w_k over the columns of W where those are fewer than its rows."""
        rows = self.head.weight
        directions = rows.T if rows.shape[1] < rows.shape[0] else jnp.eye(len(rows), dtype=rows.dtype)
        unit, products = self._products(directions)
        if rows.shape[1] < rows.shape[0]:
            return jnp.sum(unit * directions * products)
        return jnp.sum(unit * (rows @ rows.T) * products)

    def block_traces(self) -> Float[Array, "d d"]:
        """T = Σ_i e_i ‖φ_i‖² G_i."""
        unit, products = self._products(jnp.eye(self.head.num_outputs, dtype=self.feats.dtype))
        return unit * products

    def simplified_flatness(self) -> Float[Array, ""]:
        """κ̂ = ‖W‖_F² Σ_s T[s, s]."""
        unit, products = self._products(jnp.eye(self.head.num_outputs, dtype=self.feats.dtype))
        return unit * self.head.squared_norm(self.feats.dtype) * jnp.trace(products)

    def diagonal(self) -> Float[Array, "n d"]:
        """The diagonals G_i[s, s], from one product a row s for all samples."""
        logits = self.head.logits(self.feats)

        def summed_loss(logits: Float[Array, "n d"]) -> Float[Array, ""]:
            return jnp.sum(jax.vmap(self.loss)(logits, self.labels))

        def second_derivatives(direction: Float[Array, " d"]) -> Float[Array, " n"]:
            tangent = jnp.broadcast_to(direction[None, :], logits.shape)
            return jax.jvp(jax.grad(summed_loss), (logits,), (tangent,))[1] @ direction

        return self._map(second_derivatives, jnp.eye(logits.shape[1], dtype=logits.dtype)).T

    def _products(self, directions: Float[Array, "k d"]) -> tuple[Float[Array, ""], Float[Array, "k d"]]:
        """A unit, in which small features leave small curvature its digits, and T v in it for every direction v."""
        logits = self.head.logits(self.feats)
        measure = self.shares * jnp.sum(self.feats**2, axis=1)
        unit = unit_near(jnp.max(measure))
        measure = measure / unit

        def measured_loss(shift: Float[Array, " d"]) -> Float[Array, ""]:
            return jnp.sum(measure * jax.vmap(self.loss)(logits + shift[None, :], self.labels))

        origin = jnp.zeros_like(directions[0])
        return unit, self._map(lambda v: jax.jvp(jax.grad(measured_loss), (origin,), (v,))[1], directions)

    def _map(self, product: Callable[[Array], Array], directions: Float[Array, "k d"]) -> Float[Array, "k ..."]:
        chunk = max(1, _ELEMENTS_IN_FLIGHT // (len(self.feats) * directions.shape[1]))
        return jax.lax.map(product, directions, batch_size=min(chunk, len(directions)))
