"""Under bounds, flatness and collapse have a maximum, so that driving them up does not only drive them off.

For features with ‖φ‖ ≤ R and a head with ‖W‖_F ≤ B, and a softmax with C outputs:

    κ ≤ R²B²/2         as κ = E_i ‖φ_i‖² tr(Wᵀ G_i W) ≤ R² ‖W‖_F² max_i λ_max(G_i), and for a unit vector u the form
                       uᵀ G_i u is the variance of its entries under p_i, at most (max u − min u)²/4 ≤ 1/2. Attained
                       where all samples hesitate between the same two classes, whose rows are opposite, the others 0.
    κ̂ ≤ R²B²(1 − 1/C)  as Tr G_i = 1 − ‖p_i‖². Attained where every prediction is uniform.
    NCC_ε ≤ C(C − 1)/ε as V_c ≤ R² − ‖μ_c‖². Attained where all class means are 0.

NCC itself has no maximum: two class means may coincide. NCC_ε has εR² added to their squared distance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flatjax.core.distances import squared_distances
from harness.interventions.arms import Quantity

Head = dict[str, jax.Array]


class Bounds(NamedTuple):
    """Bounds hold the features and the head."""

    feature_norm: float
    """Norm R of the features."""
    head_norm: float
    """Norm B of the head."""
    softness: float
    """Softness ε of NCC_ε."""
    on_the_sphere: bool = False
    """Whether all features have the norm R, or at most that norm."""

    def features(self, feats: jax.Array) -> jax.Array:
        """Project the features that are outside their bound."""
        squares = jnp.sum(feats**2, axis=-1, keepdims=True)
        moved = (squares > self.feature_norm**2) | self.on_the_sphere
        # The root of what is not moved may be 0, where it has no derivative.
        return feats * jnp.where(moved, self.feature_norm / jnp.sqrt(jnp.where(moved, squares, 1)), 1)

    def head(self, head: Head) -> Head:
        """Return the nearest head within its bound; its bias has no part in any of the quantities."""
        norm = jnp.linalg.norm(head["kernel"])
        return head | {"kernel": head["kernel"] * jnp.where(norm > self.head_norm, self.head_norm / norm, 1)}

    def ceiling(self, quantity: Quantity, num_classes: int) -> float:
        """Return the least upper bound of κ and of κ̂ over features and biases, or of NCC_ε."""
        return {
            "kappa": self.feature_norm**2 * self.head_norm**2 / 2,
            "simplified_kappa": self.feature_norm**2 * self.head_norm**2 * (1 - 1 / num_classes),
            "ncc": num_classes * (num_classes - 1) / self.softness,
        }[quantity]


def softened_ncc(feats: jax.Array, labels: jax.Array, num_classes: int, added: float) -> jax.Array:
    """Compute Σ_{c≠c'} (V_c + V_c') / (2(‖μ_c − μ_c'‖² + `added`)) over the classes that have two samples or more."""
    counts = jax.ops.segment_sum(jnp.ones_like(feats[:, 0]), labels, num_classes)
    share = 1 / jnp.maximum(counts, 1)
    means = jax.ops.segment_sum(feats, labels, num_classes) * share[:, None]
    variances = jax.ops.segment_sum(jnp.sum((feats - means[labels]) ** 2, axis=1), labels, num_classes) * share
    kept = counts >= 2
    pairs = kept[:, None] & kept[None, :] & ~jnp.eye(num_classes, dtype=bool)
    sums = variances[:, None] + variances[None, :]
    return jnp.sum(jnp.where(pairs, sums / (2 * (squared_distances(means) + added)), 0))
