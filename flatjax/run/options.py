"""Define the options that every run has, and check values from the command line."""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flatjax.core.optional import optional
from flatjax.run.records import Record, RunFolder

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class RunOptions(abc.ABC):
    """These options are of every run: where it is kept, and whether it goes on."""

    name: str | None = None
    """Name of the run's folder; by default it says what is run."""
    folder: Path = Path("runs")
    """Folder that holds the folders of all runs."""
    resume: bool = False
    """Continue the run of this name where it stopped."""

    may_differ: ClassVar[frozenset[str]] = frozenset()
    """These options may differ too when a run is resumed: they add to its records, or change none of them."""

    @property
    @abc.abstractmethod
    def default_name(self) -> str:
        """Return the name of the run's folder where none is given."""

    @property
    def run_name(self) -> str:
        """Return the name of the run's folder."""
        return self.name or self.default_name

    def recorded(self) -> Record:
        """Return the options that a run must have again to be resumed."""
        left_out = {"name", "folder", "resume"} | self.may_differ
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}

    def open_run(self, **more: Any) -> RunFolder:
        """Open the folder of the run, with what more decides its records.

        Raises:
            SystemExit: the folder holds a run that is not to be resumed, or another one.
        """
        return RunFolder(self.folder / self.run_name, self.recorded() | more, resume=self.resume)


@dataclasses.dataclass(frozen=True)
class SeedOptions(RunOptions):
    """These options are of a run of several seeds."""

    seed: int = 0
    """First seed; it decides what data is drawn, the initial weights, the batches and the probes."""
    seeds: int = 1
    """Number of seeds to run, from `seed` on."""

    @property
    def all_seeds(self) -> range:
        """Return every seed of the run."""
        return range(self.seed, self.seed + self.seeds)


def variant_of(variants: Mapping[str, tuple[str, T]], arguments: Sequence[str]) -> T:
    """Read the options of one of several variants, each of which shows its own defaults in `--help`.

    Args:
        variants: a description and the default options of each, by the name that stands first on the command line.
        arguments: arguments of the command line. If they name no variant, the first is meant.
    """
    extras = optional("tyro", use="options are read with", extras="experiments").extras
    names_none = not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"))
    named = [next(iter(variants)), *arguments] if names_none else arguments
    description = f"Where none is named, it is {next(iter(variants))}. Each has options of its own."
    return extras.overridable_config_cli(variants, args=named, description=description)


def check_least(config: Any, least: int, *names: str) -> None:
    """End the program if an option is below the least value wanted."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise SystemExit(f"--{name.replace('_', '-')} is {value}, wanted at least {least}")


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
