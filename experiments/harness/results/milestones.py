"""Find when something happened in a curve."""

import bisect
from collections.abc import Sequence

import numpy as np


def first_step_at_least(steps: Sequence[int], values: Sequence[float], threshold: float) -> int | None:
    """Return the first step at which the value is `threshold` or more."""
    return next((step for step, value in zip(steps, values, strict=True) if value >= threshold), None)


def halfway_down(steps: Sequence[int], values: Sequence[float], peak_by: int | None = None) -> int | None:
    """Return the first step at which a positive curve, on a log axis, is half-way from its peak to its lowest point.

    The peak is the highest value up to the step `peak_by`, as later ones may be the spikes of an unstable optimizer,
    and the lowest point comes after it. Values that are not finite are passed over. The result is None where the curve
    does not come down.
    """
    logs = np.log(np.asarray(values, float))
    logs[~np.isfinite(logs)] = np.nan
    until = logs if peak_by is None else logs[: bisect.bisect_right(steps, peak_by)]
    if np.isnan(until).all():
        return None
    peak = int(np.nanargmax(until))
    lowest = np.nanmin(logs[peak:])
    below = logs[peak:] <= (logs[peak] + lowest) / 2
    return steps[peak + int(np.argmax(below))] if lowest < logs[peak] else None
