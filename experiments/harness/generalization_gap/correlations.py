"""Rank correlations of several measures with an outcome have bootstrap intervals, also given a third quantity."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class Correlation(NamedTuple):
    """A correlation is a coefficient, with the 2.5 % and 97.5 % points of its bootstrap distribution."""

    value: float
    low: float
    high: float


Coefficient = Callable[[np.ndarray, np.ndarray], float]


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Compute Kendall's τ_b, with ties counted."""
    return float(stats.kendalltau(x, y, method="asymptotic").statistic)  # which concerns the p-value alone


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Compute Spearman's rank correlation ρ."""
    x, y = (stats.rankdata(each) - (len(each) + 1) / 2 for each in (x, y))
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


COEFFICIENTS: Mapping[str, Coefficient] = {"kendall": kendall, "spearman": spearman}


def partial(of_both: float, of_x: float, of_y: float) -> float:
    """Return a coefficient of x and y given z from those of the pairs; NaN where z determines x or y."""
    left = (1 - of_x**2) * (1 - of_y**2)
    return (of_both - of_x * of_y) / math.sqrt(left) if left > 1e-12 else math.nan


def correlations(
    measures: Mapping[str, np.ndarray], outcome: np.ndarray, given: str, *, num_resamples: int, seed: int
) -> dict[str, dict[str, Correlation]]:
    """Correlate each measure with the outcome, by each coefficient, and by it given the measure `given`.

    Nothing is dropped: where a measure or the outcome is NaN for one network, so are its correlations. Networks are
    resampled with replacement, the same for all measures.
    """
    rng = np.random.default_rng(seed)
    everyone = np.arange(len(outcome))
    samples = [everyone, *rng.integers(0, len(outcome), (num_resamples, len(outcome)))]
    results: dict[str, dict[str, Correlation]] = {name: {} for name in measures}
    for kind, coefficient in COEFFICIENTS.items():
        of_given = [_if_finite(coefficient, measures[given][chosen], outcome[chosen]) for chosen in samples]
        for name, values in measures.items():
            if name == given:
                results[name][kind] = _summarised(of_given)
            else:
                plain = [_if_finite(coefficient, values[chosen], outcome[chosen]) for chosen in samples]
                results[name][kind] = _summarised(plain)
                crossed = [_if_finite(coefficient, values[chosen], measures[given][chosen]) for chosen in samples]
                results[name][f"{kind}_given"] = _summarised(
                    [partial(*each) for each in zip(plain, crossed, of_given, strict=True)]
                )
    return results


def _if_finite(coefficient: Coefficient, x: np.ndarray, y: np.ndarray) -> float:
    return math.nan if np.isnan(x).any() or np.isnan(y).any() else coefficient(x, y)


def _summarised(values: list[Any]) -> Correlation:
    value, *resampled = values
    if math.isnan(value) or not resampled:
        return Correlation(value, math.nan, math.nan)
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return Correlation(value, float(low), float(high))
