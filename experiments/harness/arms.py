"""The arms of an intervention say what is done to which network, from when and until when."""

from collections.abc import Sequence
from typing import NamedTuple

from harness.lanes import Rule
from harness.pushes import CONTROLS, SYMBOLS, Quantity


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
