"""Numbers with their standard errors, as JSON holds them.

What the text makes uncertain is told by the jackknife: with G blocks of consecutive sequences, and θ_g what comes out
without block g, the standard error is √((G − 1)/G · Σ_g (θ_g − θ̄)²). Of a mean over sequences it is that of batch
means. Texts next to each other are alike, which a block has within it; blocks are taken to be independent.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flatjax.run.records import Record, plain

BLOCKS, PROBES, WINDOWS, NONE = "blocks of text", "probes", "windows of text", "none"
"""What a standard error is over."""


Numbers = np.ndarray | np.floating
"""An array, or one number of NumPy: what its reductions return of an array of one axis."""


def quantity(value: Any, error: Any, over: str, num_tokens: int, **more: Any) -> Record:
    """A number, or a list of one a layer."""
    return {
        "value": plain(value),
        "standard_error": plain(error),
        "standard_error_over": over,
        "num_tokens": int(num_tokens),
        **{name: plain(each) for name, each in more.items()},
    }


def jackknife_error(reduced: Sequence[Any] | np.ndarray) -> Numbers:
    """Of what comes out without each block; NaN of one block alone."""
    values = np.asarray(reduced, float)
    number = len(values)
    if number < 2:
        return np.full(values.shape[1:], np.nan)
    return np.sqrt((number - 1) / number * np.sum((values - values.mean(axis=0)) ** 2, axis=0))


def ratio(sums: np.ndarray, totals: np.ndarray, blocks: np.ndarray) -> tuple[Numbers, Numbers]:
    """Σ sums / Σ totals over sequences (n, ...), and its standard error over the blocks they are in."""
    of_blocks = [(sums[blocks == each].sum(axis=0), totals[blocks == each].sum(axis=0)) for each in np.unique(blocks)]
    total, weight = (np.sum(each, axis=0) for each in zip(*of_blocks, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        reduced = [(total - own) / (weight - own_weight) for own, own_weight in of_blocks]
        return total / weight, jackknife_error(reduced)


def mean(values: np.ndarray, blocks: np.ndarray) -> tuple[Numbers, Numbers]:
    """Over sequences (n, ...), and its standard error over blocks."""
    values = np.asarray(values, float)
    return ratio(values, np.ones(len(values)), blocks)
