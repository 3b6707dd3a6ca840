"""Softmax sums over all outputs but the label, at the logits and moved up by ε(|z| + 1), taken in tile by tile."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from flatjax.flatness.parts import total, total_max


class OtherOutputs(NamedTuple):
    """Sums over the outputs read so far but the label, in units of exp of the largest logit among them.

    With s_j = ε(|z_j| + 1) they give log Σ exp(z_j + s_j) − log Σ exp(z_j) = log(1 + Σ p_j (e^{s_j} − 1)), to all
    digits however small ε is. Where an s_j is above 1 they give it as a difference, which is then not small.
    """

    largest: Float[Array, "*k n"]
    mass: Float[Array, "*k n"]
    """The sum Σ exp(z_j) in those units."""
    gain: Float[Array, "*k n"]
    """The sum Σ exp(z_j) (exp(s_j) − 1), s_j up to 1."""
    largest_moved: Float[Array, "*k n"]
    """The largest moved logit, max z_j + s_j."""
    mass_moved: Float[Array, "*k n"]
    """The sum Σ exp(z_j + s_j) in units of the largest moved logit."""
    farthest: Float[Array, "*k n"]
    """The largest s_j of an output that is not negligible beside the largest."""

    @classmethod
    def none(cls, like: Float[Array, " n"]) -> "OtherOutputs":
        zeros = jnp.zeros_like(like)
        lowest = jnp.full_like(zeros, jnp.finfo(zeros.dtype).min)
        return cls(lowest, zeros, zeros, lowest, zeros, zeros)

    def with_logits(
        self, logits: Float[Array, "n t"], offset: Float[Array, " n"], is_label: Bool[Array, "n t"], radius: float
    ) -> "OtherOutputs":
        """Takes in the logits of a tile, which are less than z by what each sample's have in common."""
        is_other = ~is_label & (logits != -jnp.inf)
        z = jnp.where(is_other, logits, 0)
        lowest = jnp.finfo(logits.dtype).min
        shift = radius * (jnp.abs(z + offset[:, None]) + 1)
        moved = z + shift

        def largest_of(values: Array) -> Array:
            return jax.lax.stop_gradient(jnp.max(jnp.where(is_other, values, lowest), axis=1))

        own = largest_of(z), largest_of(moved)
        largest, largest_moved = jnp.maximum(self.largest, own[0]), jnp.maximum(self.largest_moved, own[1])
        e = jnp.where(is_other, jnp.exp(z - largest[:, None]), 0)
        e_moved = jnp.where(is_other, jnp.exp(moved - largest_moved[:, None]), 0)
        farthest = jax.lax.stop_gradient(jnp.max(jnp.where(e_moved > 0, shift, 0), axis=1))
        before = self._relative_to(largest, largest_moved)
        return OtherOutputs(
            largest=largest,
            mass=before.mass + jnp.sum(e, axis=1),
            gain=before.gain + jnp.sum(e * jnp.expm1(jnp.minimum(shift, 1)), axis=1),
            largest_moved=largest_moved,
            mass_moved=before.mass_moved + jnp.sum(e_moved, axis=1),
            farthest=jnp.maximum(self.farthest, farthest),
        )

    @classmethod
    def merged(cls, parts: "OtherOutputs") -> "OtherOutputs":
        """Merges the sums of all parts of a head, along the first axis."""
        largest = total_max(jax.lax.stop_gradient(parts.largest), ())
        largest_moved = total_max(jax.lax.stop_gradient(parts.largest_moved), ())
        relative = parts._relative_to(largest[None], largest_moved[None])
        return cls(
            largest=largest,
            mass=total(relative.mass, ()),
            gain=total(relative.gain, ()),
            largest_moved=largest_moved,
            mass_moved=total(relative.mass_moved, ()),
            farthest=total_max(jax.lax.stop_gradient(parts.farthest), ()),
        )

    def rise_and_loss(
        self, of_label: Float[Array, " n"], offset: Float[Array, " n"], radius: float
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """The rise and the loss of each sample: with M = log Σ_{j≠y} exp(z_j) − z_y, ℓ is log(1 + e^M).

        M rises to M + d, and ℓ by log((1 + e^{M+d}) / (1 + e^M)) = log(1 + σ(M) (e^d − 1)).
        """
        is_none = self.mass == 0
        mass = jnp.where(is_none, 1, self.mass)
        margin = jnp.where(is_none, -jnp.inf, self.largest - of_label + jnp.log(mass))
        loss = jax.nn.softplus(margin)
        shift = radius * (jnp.abs(of_label + offset) + 1)
        is_near = (self.farthest <= 1) & (shift <= 1)
        change = jnp.where(is_near, shift + jnp.log1p(self.gain / mass), 0)
        near = jnp.log1p(jax.nn.sigmoid(margin) * jnp.expm1(change))
        mass_moved = jnp.where(is_none, 1, self.mass_moved)
        moved = jnp.where(is_none, -jnp.inf, self.largest_moved - of_label + jnp.log(mass_moved) + shift)
        return jnp.where(is_near, near, jax.nn.softplus(moved) - loss), loss

    def _relative_to(self, largest: Array, largest_moved: Array) -> "OtherOutputs":
        unit, unit_moved = jnp.exp(self.largest - largest), jnp.exp(self.largest_moved - largest_moved)
        return self._replace(mass=unit * self.mass, gain=unit * self.gain, mass_moved=unit_moved * self.mass_moved)
