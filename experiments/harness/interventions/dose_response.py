"""A dose response is what a decade more of a held quantity does, and how much the baseline has as it generalizes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flatjax.run.records import Record, number
from flatjax.run.tables import aligned
from harness.interventions.arm_results import ArmResult
from harness.interventions.arms import QUANTITIES, RECORDED, SYMBOLS, Quantity
from harness.interventions.outcomes import Seed, at_the_end, generalized_at
from harness.results.intervals import Interval, interval


class DoseResponse(NamedTuple):
    """A quantity's dose response is over the levels whose arms fit their training set, with intervals over seeds."""

    quantity: Quantity
    levels: list[float]
    held_out: Interval
    """Final held-out accuracy that a decade adds: the slope of a line through a seed's levels."""
    log_delay: Interval | None
    """Slope of the delay's logarithm in the same way; a delay that had not ended counts as if it had. It is None where
    no network generalized."""
    at_generalization: list[float]
    """Value of the quantity on the baseline's training set as it generalizes, for the seeds that do."""


def dose_responses(
    results: Sequence[ArmResult], baseline: Sequence[Sequence[Record]], resolution: int
) -> list[DoseResponse]:
    """Return the dose response of every quantity that is held at two levels or more."""
    found = []
    for quantity in QUANTITIES:
        arms = [
            each for each in results if each.arm.rule.is_held and each.arm.rule.quantity == quantity and each.answers
        ]
        if len(arms) < 2:
            continue
        levels = [each.arm.level for each in arms]
        accuracies = [at_the_end(each.seeds, "held_out_accuracy") for each in arms]
        delays = [[_delay(seed, resolution) for seed in each.seeds] for each in arms]
        some = any(not seed.is_censored for each in arms for seed in each.seeds)
        name = f"train_{RECORDED[quantity]}"
        steps = [(records, generalized_at(records)) for records in baseline]
        at = [number(r[name]) for records, step in steps for r in records if r["step"] == step]
        found.append(
            DoseResponse(
                quantity, levels, _slopes(levels, accuracies), _slopes(levels, np.log(delays)) if some else None, at
            )
        )
    return found


def _delay(seed: Seed, resolution: int) -> float:
    return np.nan if seed.delay is None else max(seed.delay, resolution)


def _slopes(levels: Sequence[float], values: Sequence[Sequence[float]] | np.ndarray) -> Interval:
    return interval(np.polyfit(np.log10(levels), np.asarray(values), 1)[0].tolist())


def dose_response_table(found: Sequence[DoseResponse]) -> str:
    """Format a row per quantity; the table is empty where none is held at two levels."""
    if not found:
        return ""
    cells = [["a decade more, held", "of levels", "held out, %", "× delay", "baseline's as it generalizes"]]
    for each in found:
        delay = ""
        if each.log_delay is not None:
            mean, reach = each.log_delay
            delay = "{:.2f} [{:.2f}, {:.2f}]".format(*np.exp([mean, mean - reach, mean + reach]))
        cells.append(
            [
                SYMBOLS[each.quantity],
                ", ".join(f"{level:g}" for level in each.levels),
                f"{100 * each.held_out.mean:+.2f} ± {100 * each.held_out.half_width:.2f}",
                delay,
                f"{min(each.at_generalization):.2g} to {max(each.at_generalization):.2g}"
                if each.at_generalization
                else "",
            ]
        )
    return aligned(cells)
