"""What a value on the command line must be."""

from typing import Any


def check_least(config: Any, least: int, *names: str, or_zero: bool = False) -> None:
    """Ends the program at an option below the least that is wanted, 0 being, `or_zero`, a choice of its own."""
    for name in names:
        value = getattr(config, name)
        if value < least and not (or_zero and value == 0):
            raise SystemExit(
                f"--{name.replace('_', '-')} is {value}, wanted at least {least}{', or 0' if or_zero else ''}"
            )
