"""Compute confidence intervals of means over seeds, and of paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """An interval is a mean, with half the width of its 95 % confidence interval."""

    mean: float
    half_width: float


def interval(values: Sequence[float]) -> Interval:
    """Return the interval by Student's t; its width is NaN for a single value."""
    if len(values) < 2:
        return Interval(float(np.mean(values)), math.nan)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return Interval(float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * error))


def is_clear(gain: Interval) -> bool:
    """Say whether the interval leaves out 0."""
    return abs(gain.mean) > gain.half_width


class Effect(NamedTuple):
    """An effect is a paired difference over seeds, also given in units of its standard deviation."""

    difference: Interval
    standardised: float


def effect(values: Sequence[float], reference: Sequence[float]) -> Effect:
    """Return the effect; it is NaN where any value is, as a network that diverged is not left out."""
    differences = np.subtract(values, reference)
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else math.nan
    mean = float(np.mean(differences))
    return Effect(interval(differences.tolist()), mean / spread if spread > _ROUNDING else math.nan)


_ROUNDING = 1e-6
"""Accuracies in float32 are rounded by this: differences that spread less are the same in all seeds."""
