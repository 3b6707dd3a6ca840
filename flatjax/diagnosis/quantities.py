"""Numbers stand with their standard errors, as JSON holds them.

The jackknife tells how uncertain the text makes a number. With G blocks of consecutive sequences, and θ_g the number
without block g, the standard error is √((G − 1)/G · Σ_g (θ_g − θ̄)²). For a mean over sequences this is the error of
batch means. Neighbouring texts are alike; they share a block, and the blocks are taken to be independent.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flatjax.run.records import Record, plain

BLOCKS, PROBES, WINDOWS, NONE = "blocks of text", "probes", "windows of text", "none"
"""A standard error is over one of these."""


Numbers = np.ndarray | np.floating
"""Numbers are an array, or one number of NumPy, which its reductions return for an array of one axis."""


def quantity(value: Any, error: Any, over: str, num_tokens: int, **more: Any) -> Record:
    """Return a number, or a list of one per layer."""
    return {
        "value": plain(value),
        "standard_error": plain(error),
        "standard_error_over": over,
        "num_tokens": int(num_tokens),
        **{name: plain(each) for name, each in more.items()},
    }


def jackknife_error(reduced: Sequence[Any] | np.ndarray) -> Numbers:
    """Return the standard error from values without each block; it is NaN for a single block."""
    values = np.asarray(reduced, float)
    number = len(values)
    if number < 2:
        return np.full(values.shape[1:], np.nan)
    return np.sqrt((number - 1) / number * np.sum((values - values.mean(axis=0)) ** 2, axis=0))


def ratio(sums: np.ndarray, totals: np.ndarray, blocks: np.ndarray) -> tuple[Numbers, Numbers]:
    """Return Σ sums / Σ totals over sequences (n, ...), and its standard error over the blocks they are in."""
    of_blocks = [(sums[blocks == each].sum(axis=0), totals[blocks == each].sum(axis=0)) for each in np.unique(blocks)]
    total, weight = (np.sum(each, axis=0) for each in zip(*of_blocks, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        reduced = [(total - own) / (weight - own_weight) for own, own_weight in of_blocks]
        return total / weight, jackknife_error(reduced)


def mean(values: np.ndarray, blocks: np.ndarray) -> tuple[Numbers, Numbers]:
    """Return the mean over sequences (n, ...), and its standard error over blocks."""
    values = np.asarray(values, float)
    return ratio(values, np.ones(len(values)), blocks)
