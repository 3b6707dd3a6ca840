"""Read the values of a config.json by key, each of the kind that is wanted there."""

from collections.abc import Callable, Mapping
from typing import Any

from flatjax.loading.files import Json, shown


class Values:
    """Reads the values of a JSON object; a null is as if its key were not there, and the default holds.

    A value of another kind is read as if it were not there. It is noted in `problems`, so that all of them are listed
    at once.
    """

    def __init__(self, given: Mapping[str, Any], prefix: str = "", problems: list[str] | None = None):
        self.given: Json = {key: value for key, value in given.items() if value is not None}
        self.prefix = prefix
        self.problems: list[str] = [] if problems is None else problems

    def size(self, key: str, default: int | None = None) -> Any:
        """Reads a whole number; 2.0 is none, and true is none either."""
        return self._read(key, default, _is_size, "a whole number above 0")

    def number(self, key: str, default: float = 1.0) -> float:
        return float(self._read(key, default, _is_number, "a number above 0"))

    def flag(self, key: str, default: bool) -> bool:
        return self._read(key, default, _is_flag, "true or false")

    def inner(self, key: str) -> "Values":
        """Reads an object within, whose problems are gathered with these."""
        found = self._read(key, {}, _is_object, "an object")
        return Values(found, f"{self.prefix}{key}.", self.problems)

    def _read(self, key: str, default: Any, is_wanted: Callable[[Any], bool], wanted: str) -> Any:
        value = self.given.get(key, default)
        if key not in self.given or is_wanted(value):
            return value
        self.problems.append(f"{self.prefix}{key} is {shown(value)}, wanted {wanted}")
        return default


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_number(value: Any) -> bool:
    """Whether it is a number that float32 can hold, above 0."""
    return type(value) in (int, float) and 1e-37 < value < 1e38


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)
