"""Ways to regularise share one signature: a loss of what enters the head, and an optimizer, each for a strength."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import optax

from flatjax import cross_entropy, cross_entropy_and_flatness, simplified_relative_flatness
from flatjax.training import confidence_penalty, label_smoothing, sharpness_aware

Head = Mapping[str, jax.Array]

Method = Literal[
    "baseline", "weight_decay", "label_smoothing", "confidence_penalty", "sam", "asam", "kappa", "simplified_kappa"
]


def _plain(head: Head, feats: jax.Array, labels: jax.Array, strength: jax.Array) -> jax.Array:
    return cross_entropy(_logits(head, feats), labels).mean()


def _label_smoothing(head: Head, feats: jax.Array, labels: jax.Array, strength: jax.Array) -> jax.Array:
    return label_smoothing(_logits(head, feats), labels, strength).mean()


def _confidence_penalty(head: Head, feats: jax.Array, labels: jax.Array, strength: jax.Array) -> jax.Array:
    logits = _logits(head, feats)
    return cross_entropy(logits, labels).mean() + strength * confidence_penalty(logits).mean()


def _kappa(head: Head, feats: jax.Array, labels: jax.Array, strength: jax.Array) -> jax.Array:
    loss, kappa = cross_entropy_and_flatness(head, feats, labels)
    return loss + strength * kappa


def _simplified_kappa(head: Head, feats: jax.Array, labels: jax.Array, strength: jax.Array) -> jax.Array:
    return _plain(head, feats, labels, strength) + strength * simplified_relative_flatness(head, feats, labels)


def _logits(head: Head, feats: jax.Array) -> jax.Array:
    return feats @ head["kernel"] + head["bias"]


Optimizer = optax.GradientTransformation


def _alone(optimizer: Optimizer, strength: jax.Array) -> Optimizer:
    return optimizer


def _decayed(optimizer: Optimizer, strength: jax.Array) -> Optimizer:
    return optax.chain(optax.add_decayed_weights(strength), optimizer)


def _sam(optimizer: Optimizer, strength: jax.Array) -> Optimizer:
    return sharpness_aware(optimizer, strength)


def _asam(optimizer: Optimizer, strength: jax.Array) -> Optimizer:
    return sharpness_aware(optimizer, strength, adaptive=True)


class Regulariser(NamedTuple):
    """A regulariser is what is minimised, by what optimizer, and the weakest and strongest of the strengths to try."""

    name: str
    strengths: tuple[float, float] | None
    objective: Callable[[Head, jax.Array, jax.Array, jax.Array], jax.Array] = _plain
    optimizer: Callable[[Optimizer, jax.Array], Optimizer] = _alone


REGULARISERS: dict[Method, Regulariser] = {
    "baseline": Regulariser("baseline", None),
    "weight_decay": Regulariser("weight decay", (1e-4, 1e-1), optimizer=_decayed),
    "label_smoothing": Regulariser("label smoothing", (9e-4, 9e-1), objective=_label_smoothing),
    "confidence_penalty": Regulariser("confidence penalty", (1e-2, 1e1), objective=_confidence_penalty),
    "sam": Regulariser("SAM", (3e-3, 3.0), optimizer=_sam),
    "asam": Regulariser("ASAM", (3e-2, 3e1), optimizer=_asam),
    "kappa": Regulariser("κ", (3e-4, 3e-1), objective=_kappa),
    "simplified_kappa": Regulariser("κ̂", (3e-5, 3e-2), objective=_simplified_kappa),
}
"""Strengths are, in this order, the coupled λ of an L2 penalty, the mass that is smoothed, λ of the confidence penalty,
the radii of SAM and ASAM, and λ of κ and κ̂."""
