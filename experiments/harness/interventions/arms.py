"""The arms of an intervention say what is added to which network's loss, from when and until when.

An arm adds a quantity, what holds it at a level, or a control of the same size.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from flatjax import ClassMoments, cross_entropy, relative_flatness, simplified_relative_flatness
from flatjax.collapse import ncc
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


class Rule(NamedTuple):
    """A rule says what is added to the loss. It is compiled once."""

    quantity: Quantity | None = None
    is_held: bool = False
    """Whether strength · (log q − log level)² is added, or strength · q, where NCC_ε stands for NCC."""
    control: Control | None = None
    """The control's gradient is added, in the size that strength · q's gradient would have at the same parameters."""


class Arm(NamedTuple):
    """An arm is a rule with its strength and level between two steps; outside of these there is no intervention."""

    name: str
    rule: Rule
    strength: float = 0.0
    level: float = 1.0
    since: int = 0
    until: int | None = None
    control_of: str | None = None
    """Name of the arm whose term this arm's term matches in size."""

    @property
    def folder(self) -> str:
        """Return the name as a file may have it."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)

    def rule_at(self, step: int) -> Rule:
        """Return the rule for what is minimised in the step after `step`."""
        is_on = self.since <= step and (self.until is None or step < self.until)
        return self.rule if is_on else BASELINE.rule


BASELINE = Arm("baseline", Rule())
"""The baseline adds nothing to the loss. It is also the arm that is unplugged from the start."""


def pushed(quantity: Quantity, strength: float, *, until: int | None = None, since: int = 0) -> Arm:
    """List the arms that drive flatness or collapse up, at a negative strength, or down, at a positive one."""
    where = "against" if strength < 0 else "towards"
    what = f"{where} {SYMBOLS[quantity]}, λ = {abs(strength):g}"
    name = what if until is None else f"{what}, unplugged at {until}"
    return Arm(name, Rule(quantity), strength, since=since, until=until)


def controls(arm: Arm) -> list[Arm]:
    """List the controls, each in the size of the arm's term."""
    return [
        arm._replace(
            name=f"{control.replace('_', ' ')} as {arm.name}",
            rule=arm.rule._replace(control=control),
            strength=abs(arm.strength),
            control_of=arm.name,
        )
        for control in CONTROLS
    ]


def held(quantity: Quantity, levels: Sequence[float], strength: float, since: int) -> list[Arm]:
    """List the arms that hold a quantity, one for each level."""
    rule = Rule(quantity, is_held=True)
    return [Arm(f"{SYMBOLS[quantity]} held at {level:g}", rule, strength, level, since) for level in levels]


def measured(quantity: Quantity, head: Head, feats: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
    """Measure κ and κ̂ at temperature 1, and NCC, of the features that the network uses."""
    if quantity == "ncc":
        return ncc(ClassMoments.init(num_classes, feats.shape[1], dtype=feats.dtype).update(feats, labels))
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
