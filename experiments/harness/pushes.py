"""An intervention adds to the loss a quantity, what holds it at a level, or a control of the same size."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from flatjax import cross_entropy, neural_collapse, relative_flatness, simplified_relative_flatness
from flatjax.training import confidence_penalty, label_smoothing

Head = dict[str, jax.Array]
Quantity = Literal["kappa", "simplified_kappa", "ncc"]
Control = Literal["confidence_penalty", "label_smoothing", "weight_decay"]

QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
CONTROLS: tuple[Control, ...] = get_args(Control)
SYMBOLS: dict[str, str] = {"kappa": "κ", "simplified_kappa": "κ̂", "ncc": "NCC"}
RECORDED: dict[str, str] = {
    "kappa": "relative_flatness", "simplified_kappa": "simplified_relative_flatness", "ncc": "ncc"
}  # fmt: skip
"""Quantities have these names in the records."""


def measured(quantity: Quantity, head: Head, feats: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Measure κ and κ̂ at temperature 1, and NCC, of the features that the network uses."""
    if quantity == "ncc":
        return neural_collapse(head, feats, labels, num_classes=num_classes).ncc
    metric = relative_flatness if quantity == "kappa" else simplified_relative_flatness
    return metric(head, feats, labels)


def distance_from_level(value: jax.Array, level: jax.Array) -> jax.Array:
    """Return (log q − log q*)², whose gradient 2(log q − log q*) ∇q/q does not vanish with q.

    NaN or infinite where q is, where it is not positive, and where it has underflowed: never a plausible number.
    """
    return (jnp.log(value) - jnp.log(level)) ** 2


def control_of(control: Control, params: Any, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return what the control's gradient is of; its size is to be that of another term."""
    if control == "weight_decay":
        return 0.5 * optax.tree.norm(params, squared=True)
    if control == "confidence_penalty":
        return confidence_penalty(logits).mean()
    return (label_smoothing(logits, labels, 1.0) - cross_entropy(logits, labels)).mean()


def of_size(direction: Any, like: Any) -> Any:
    """Return a gradient with the direction of one and the norm of another; NaN if the one has no direction.

    Norms are Euclidean.
    """
    return optax.tree.scale(optax.tree.norm(like) / optax.tree.norm(direction), direction)
