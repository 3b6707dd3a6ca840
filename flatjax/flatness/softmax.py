"""Relative flatness under softmax cross-entropy, in closed form, without the cancellation of its usual one.

With p_i = softmax(z_i) the logit-space Hessian is G_i = diag(p_i) − p_i p_iᵀ, and tr(Wᵀ G_i W) is the variance v_i of
the rows of W under p_i. As training ends, p_i falls on one row and v_i to 1e-8 and far below. There the variance as it
is usually written, Σp‖w‖² − ‖Σpw‖², is noise in float32. Two forms are not:

* over pairs of rows, v = Σ_{s<t} p_s p_t ‖w_s − w_t‖²: a sum of non-negative terms, for heads with few outputs;
* around the row j of the largest logit, for heads with many: with sums over s ≠ j only, q = Σ p_s,
  v = Σ p_s ‖w_s − w_j‖² − ‖Σ p_s (w_s − w_j)‖², where every term is of the order of q.

Heads whose logits are too many to be in memory at once are read in tiles of rows, around the largest logit so far.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flatjax.core.distances import squared_distances_around
from flatjax.flatness.frame import framed, mean_by_importance, unit_of
from flatjax.flatness.tiled.readout import Readout, read_out
from flatjax.heads import LinearHead

MOST_LOGITS = 2**23
"""How many logits may be in memory at once, by choice."""


class SoftmaxCurvature(NamedTuple):
    """The logit-space Hessians G_i = diag(p_i) − p_i p_iᵀ of a head; sample i has the share e_i."""

    head: LinearHead
    feats: Float[Array, "n m"]
    shares: Float[Array, " n"]

    def relative_flatness(self) -> Float[Array, ""]:
        """κ = Σ_i e_i ‖φ_i‖² v_i."""
        (d, m), n = self.head.weight.shape, len(self.feats)
        # Matrix products: d²(n + m) for the pairs, beside the logits' n·d·m; another n·d·m around the largest logit.
        variances = self.variances_over_pairs() if d * (n + m) <= n * m else self.variances_around_the_largest()
        return jnp.sum(self._measure() * variances)

    def variances_over_pairs(self) -> Float[Array, " n"]:
        """v_i = ½ Σ_{s,t} p_s p_t ‖w_s − w_t‖²."""
        head = framed(self.head, self.feats)
        logits = head.logits(self.feats)
        relative = _relative_to_largest(logits)
        total = jnp.sum(relative, axis=1)
        others = jnp.sum(jnp.where(_row_mask(jnp.argmax(logits, axis=1), logits), 0, relative), axis=1)
        distances = squared_distances_around(head.weight, self._mean_row(head, relative / total[:, None], others))
        return jnp.sum((relative @ distances) * relative, axis=1) / (2 * total**2)

    def variances_around_the_largest(self) -> Float[Array, " n"]:
        """v_i = n̄ + q‖w_j‖² − 2⟨r, w_j⟩ − ‖r − q w_j‖² with n̄ = Σ p_s‖w_s‖², r = Σ p_s w_s over s ≠ j."""
        head = framed(self.head, self.feats)
        logits = head.logits(self.feats)
        j = jnp.argmax(logits, axis=1)
        largest = _row_mask(j, logits)
        # In units of the second largest probability, that no sum underflows before the result does.
        lowest = jnp.finfo(logits.dtype).min  # for −∞: there may be no other row, or none but masked ones
        second = jax.lax.stop_gradient(
            jnp.max(jnp.where(largest, lowest, logits), axis=1, keepdims=True, initial=lowest)
        )
        others = jnp.exp(jnp.where(largest, -jnp.inf, logits - second))
        unit = jnp.exp(second[:, 0] - jnp.sum(jnp.where(largest, logits, 0), axis=1))
        total = 1 + unit * jnp.sum(others, axis=1)
        unit = unit / total
        p = jnp.where(largest, 1 / total[:, None], unit[:, None] * others)
        rows = head.weight - self._mean_row(head, p, unit * jnp.sum(others, axis=1))[None, :]
        row_norms = jnp.sum(rows**2, axis=1)
        q, r = jnp.sum(others, axis=1), others @ rows
        second_moment = others @ row_norms + q * row_norms[j] - 2 * jnp.sum(r * rows[j], axis=1)
        return unit * (second_moment - unit * jnp.sum((r - q[:, None] * rows[j]) ** 2, axis=1))

    def block_traces(self) -> Float[Array, "d d"]:
        """T = Σ_i e_i ‖φ_i‖² (diag(p_i) − p_i p_iᵀ)."""
        p, rest = self._probabilities()
        measured = self._measure()[:, None] * p
        return jnp.where(jnp.eye(p.shape[1], dtype=bool), jnp.diag(jnp.sum(measured * rest, axis=0)), -(measured.T @ p))

    def simplified_flatness(self) -> Float[Array, ""]:
        """κ̂ = Σ_i e_i ‖φ_i‖² ‖W‖_F² Σ_s p_s (1 − p_s), in an order that keeps a small p."""
        squared_norm = self.head.squared_norm(self.feats.dtype)
        return jnp.sum(squared_norm * self._measure() * jnp.sum(self.diagonal(), axis=1))

    def diagonal(self) -> Float[Array, "n d"]:
        """The diagonals G_i[s, s] = p_s (1 − p_s)."""
        p, rest = self._probabilities()
        return p * rest

    def _mean_row(self, head: LinearHead, p: Float[Array, "n d"], rest: Float[Array, " n"]) -> Float[Array, " m"]:
        """Where the rows that matter are: their variance does not know it, and their rounding errors do.

        Those rows matter that samples hesitate between. Each sample leaves its largest probability a `rest`.
        """
        importance = rest * jnp.sum(self.feats**2, axis=1)
        return jax.lax.stop_gradient(mean_by_importance(p, importance) @ head.weight)

    def _measure(self) -> Float[Array, " n"]:
        return self.shares * jnp.sum(self.feats**2, axis=1)

    def _probabilities(self) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
        """The probabilities p and 1 − p, the latter as the sum of the other rows where the difference would cancel."""
        logits = framed(self.head, self.feats).logits(self.feats)
        relative = _relative_to_largest(logits)
        largest = _row_mask(jnp.argmax(logits, axis=1), relative)
        others = jnp.sum(jnp.where(largest, 0, relative), axis=1, keepdims=True)
        total = jnp.sum(relative, axis=1, keepdims=True)
        return relative / total, jnp.where(largest, others, total - relative) / total


class TiledSoftmaxCurvature(NamedTuple):
    """The logit-space Hessians G_i = diag(p_i) − p_i p_iᵀ of a head, as far as they need no logits in memory."""

    head: LinearHead
    feats: Float[Array, "n m"]
    shares: Float[Array, " n"]
    tile_size: int | None = None

    def relative_flatness(self) -> Float[Array, ""]:
        """κ = Σ_i e_i ‖φ_i‖² v_i."""
        return jnp.sum(self.shares * self._readout().flatness)

    def simplified_flatness(self) -> Float[Array, ""]:
        """κ̂ = Σ_i e_i ‖φ_i‖² ‖W‖_F² tr G_i."""
        dtype = self.feats.dtype
        unit = unit_of(self.head).astype(dtype)
        squared_norm = jnp.sum((self.head.matrix.astype(dtype) / unit) ** 2)
        squares = jnp.sum((self.feats * unit) ** 2, axis=1)
        return jnp.sum(self.shares * (squares * squared_norm) * self._readout().traces)

    def _readout(self) -> Readout:
        return read_out(self.head, self.feats, tile_size=self.tile_size)


def reads_in_tiles(head: LinearHead, num_samples: int, tile_size: int | None) -> bool:
    """Whether the logits are not to be in memory at once: so if they are many, and larger than the features."""
    if tile_size is not None:
        return tile_size < head.num_outputs
    return head.num_outputs > head.num_features and num_samples * head.num_outputs > MOST_LOGITS


def _relative_to_largest(logits: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The ratios p_s / p_j, for the row j of the largest logit."""
    return jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True)))


def _row_mask(j: Integer[Array, " n"], like: Float[Array, "n d"]) -> Bool[Array, "n d"]:
    """Marks where s is j_i: one row a sample, even if several logits are the largest."""
    return jnp.arange(like.shape[1])[None, :] == j[:, None]
