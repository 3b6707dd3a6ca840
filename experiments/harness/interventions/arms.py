"""The arms of an intervention: what is done to which network, from when and until when."""

from collections.abc import Sequence
from typing import NamedTuple

from harness.interventions.pushes import CONTROLS, SYMBOLS, Quantity
from harness.interventions.training import Rule


class Arm(NamedTuple):
    """A rule with its strength and level between two steps; before and after them there is no intervention."""

    name: str
    rule: Rule
    strength: float = 0.0
    level: float = 1.0
    since: int = 0
    until: int | None = None
    control_of: str | None = None
    """The arm whose term this one's matches in size."""

    @property
    def folder(self) -> str:
        """The name as a file may have it."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.name)

    def rule_at(self, step: int) -> Rule:
        """What is minimised in the step after."""
        is_on = self.since <= step and (self.until is None or step < self.until)
        return self.rule if is_on else BASELINE.rule


BASELINE = Arm("baseline", Rule())
"""Nothing is added: it is also the arm that is unplugged from the start."""


def pushed(quantity: Quantity, strength: float, *, until: int | None = None, since: int = 0) -> Arm:
    """Against flatness or collapse at a negative strength, as q is then driven up, and towards them at a positive."""
    where = "against" if strength < 0 else "towards"
    what = f"{where} {SYMBOLS[quantity]}, λ = {abs(strength):g}"
    name = what if until is None else f"{what}, unplugged at {until}"
    return Arm(name, Rule(quantity), strength, since=since, until=until)


def controls(arm: Arm) -> list[Arm]:
    """Each in the size of the arm's term."""
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
    """Each at a level."""
    rule = Rule(quantity, is_held=True)
    return [Arm(f"{SYMBOLS[quantity]} held at {level:g}", rule, strength, level, since) for level in levels]
