"""Timings of several functions side by side, in turn, so that a machine's moods fall on all of them alike."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Timing(NamedTuple):
    """Seconds a call, and the ratio to the reference, round by round: the median, and its quartiles."""

    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def side_by_side(
    calls: Mapping[str, Callable[[], Any]], *, reference: str, min_seconds: float = 3.0, min_rounds: int = 5
) -> dict[str, Timing]:
    """Runs every call in turn, round after round, until `min_seconds` and `min_rounds` have passed."""
    for call in calls.values():
        jax.block_until_ready(call())
    rounds: list[list[float]] = []
    started = time.perf_counter()
    while len(rounds) < min_rounds or time.perf_counter() - started < min_seconds:
        rounds.append([_seconds(call) for call in calls.values()])
    seconds = np.array(rounds)
    ratios = seconds / seconds[:, [list(calls).index(reference)]]
    quartiles = np.percentile(ratios, [25, 75], axis=0)
    return {
        name: Timing(
            seconds=float(np.median(seconds[:, i])),
            ratio=float(np.median(ratios[:, i])),
            ratio_quartiles=(float(quartiles[0, i]), float(quartiles[1, i])),
        )
        for i, name in enumerate(calls)
    }


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started
