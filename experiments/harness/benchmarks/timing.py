"""Time several functions side by side, in turn, so that a machine's moods fall on all of them equally."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm


class Timing(NamedTuple):
    """A timing is seconds per call, and the ratio to the reference by round: the median, and its quartiles."""

    seconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]


def side_by_side(
    calls: Mapping[str, Callable[[], Any]], *, reference: str, min_seconds: float = 3.0, min_rounds: int = 5
) -> dict[str, Timing]:
    """Run every call in turn, round after round, until `min_seconds` and `min_rounds` have passed.

    The bar counts the calls of the fewest rounds.
    """
    repeats = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        repeats[name] = max(1, round(_SECONDS_A_TURN / _seconds(call, 1)))
    rounds: list[list[float]] = []
    started = time.perf_counter()
    with tqdm(total=min_rounds * len(calls), desc="timing", leave=False, disable=None) as bar:
        while len(rounds) < min_rounds or time.perf_counter() - started < min_seconds:
            rounds.append([])
            for name, call in calls.items():
                rounds[-1].append(_seconds(call, repeats[name]))
                bar.update()
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


_SECONDS_A_TURN = 0.05
"""A call that takes less is repeated in its turn, as its first run finds the caches full of another's data."""


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - started) / repeats


def temporary_memory(function: Callable, arguments: tuple[Any, ...]) -> int:
    """Return the bytes that a compiled call needs beside its arguments and results."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the {jax.default_backend()} backend of jax does not say what memory it takes")
    return analysis.temp_size_in_bytes
