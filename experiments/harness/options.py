"""Check values from the command line."""

import math
from typing import Any


def check_least(config: Any, least: int, *names: str, or_zero: bool = False) -> None:
    """End the program if an option is below the least value wanted; 0 is a choice of its own with `or_zero`."""
    for name in names:
        value = getattr(config, name)
        if value < least and not (or_zero and value == 0):
            raise SystemExit(
                f"--{name.replace('_', '-')} is {value}, wanted at least {least}{', or 0' if or_zero else ''}"
            )


def check_above_0(config: Any, *names: str) -> None:
    """End the program if an option has a number that is not finite and above 0; None is a choice."""
    for name in names:
        value = getattr(config, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not 0 < each < math.inf:
                raise SystemExit(f"--{name.replace('_', '-')} has {each}, wanted numbers above 0")


def check_not_empty(config: Any, *names: str) -> None:
    """End the program if an option is empty."""
    for name in names:
        if not getattr(config, name):
            raise SystemExit(f"--{name.replace('_', '-')} is empty, wanted one at least")


def check_heads(width: int, heads: int, key_value_heads: int = 0) -> None:
    """End the program if attention heads do not share a width evenly, or have an odd one.

    With 0 heads of keys and values there are as many as attention heads.
    """
    if heads < 1 or width % heads:
        raise SystemExit(f"--heads is {heads}, wanted a divisor of --width, {width}")
    if width // heads % 2:
        raise SystemExit(f"--heads is {heads} of --width {width}, wanted heads of an even width, as pairs are rotated")
    if key_value_heads < 0 or (key_value_heads and heads % key_value_heads):
        raise SystemExit(f"--key-value-heads is {key_value_heads}, wanted a divisor of --heads, {heads}, or 0")
