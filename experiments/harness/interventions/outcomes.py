"""An effect tells what an arm did by seed beside another arm: paired differences with 95 % intervals."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flatjax.run.records import Record, number
from harness.results.intervals import interval

FITTED = GENERALIZED = 0.99
_AT_THE_END = 5
"""The value at the end is the median of this many measurements, as one may fall into a spike of the optimizer."""


class Seed(NamedTuple):
    """The outcome of one seed under one arm has NaN for the numbers of a network that diverged."""

    fitted: int | None
    """Step at which 99 % of the training set is right."""
    generalized: int | None
    """Step at which 99 % of the held-out set is right."""
    last: int
    diverged: int | None
    """Step at which the loss was found not to be finite."""
    end: dict[str, float]
    """Median of every quantity over the last five measurements."""

    @property
    def delay(self) -> float | None:
        """Return the steps from fitting to generalizing.

        A seed that never generalized has at least `last - fitted`: see `is_censored`.
        """
        if self.fitted is None or self.diverged is not None:
            return None
        return max(0, (self.last if self.generalized is None else self.generalized) - self.fitted)

    @property
    def is_censored(self) -> bool:
        return self.generalized is None


def generalized_at(records: Sequence[Record]) -> int | None:
    """Return the first step at which 99 % of the held-out set is right, in one seed's records."""
    return _first(records, lambda record: number(record["held_out_accuracy"]) >= GENERALIZED)


def diverged_at(records: Sequence[Record]) -> int | None:
    """Return the first step at which the loss is not finite."""
    return _first(records, lambda record: not math.isfinite(number(record["train_loss"])))


def _first(records: Sequence[Record], holds: Callable[[Record], bool]) -> int | None:
    return next((record["step"] for record in records if holds(record)), None)


def outcome(records: Sequence[Record]) -> Seed:
    """Return the outcome of one seed's records, which are in the order of steps."""
    diverged = diverged_at(records)
    last = {
        name: [number(record[name]) for record in records[-_AT_THE_END:]]
        for name in records[0]
        if name not in _NOT_MEASURED
    }
    return Seed(
        fitted=_first(records, lambda record: number(record["train_accuracy"]) >= FITTED),
        generalized=generalized_at(records),
        last=records[-1]["step"],
        diverged=diverged,
        end={name: math.nan if diverged is not None else float(np.median(values)) for name, values in last.items()},
    )


_NOT_MEASURED = {"arm", "seed", "step"}


def at_the_end(seeds: Sequence[Seed], name: str) -> list[float]:
    return [seed.end[name] for seed in seeds]


def answers(seeds: Sequence[Seed]) -> bool:
    """Say whether the training set is fitted in every seed; else the arm says nothing of generalization."""
    return all(seed.end["train_accuracy"] >= FITTED for seed in seeds)


class Ratio(NamedTuple):
    """A ratio is a geometric mean with its 95 % interval; it is only a bound where some seed never got there."""

    ratio: float
    low: float
    high: float
    bound: str
    """Bound: "≥" if some of the arm never generalized, "≤" if some of the reference did not, "?" if both, else ""."""


def delay_ratio(seeds: Sequence[Seed], reference: Sequence[Seed], resolution: int) -> Ratio | None:
    """Return the ratio of delays of generalization, paired by seed; None if a network never fitted or diverged.

    A delay counts as `resolution` at least: the steps between two measurements.
    """
    delays = [[seed.delay for seed in of_arm] for of_arm in (seeds, reference)]
    if any(delay is None for of_arm in delays for delay in of_arm):
        return None
    above, below = (np.log(np.maximum(np.array(of_arm, float), resolution)) for of_arm in delays)
    mean, reach = interval((above - below).tolist())
    ratio, low, high = np.exp([mean, mean - reach, mean + reach]).tolist()
    censored = any(seed.is_censored for seed in seeds), any(seed.is_censored for seed in reference)
    return Ratio(ratio, low, high, {(0, 0): "", (1, 0): "≥", (0, 1): "≤", (1, 1): "?"}[censored])
