"""A result shows what came of an arm, beside its baseline and the controls of its size: a table, and a summary."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flatjax.run.records import Record, number
from flatjax.run.tables import aligned
from harness.interventions.arms import BASELINE, RECORDED, Arm
from harness.interventions.bounds import Bounds
from harness.interventions.outcomes import FITTED, Ratio, Seed, answers, at_the_end, delay_ratio, outcome
from harness.results.intervals import Effect, Interval, effect, interval

AT_THE_CEILING = 0.95
"""Shares of the ceiling at and above this count as at the ceiling."""
NOT_HELD = 1.25
"""A held arm is said not to be held if its median of max(q/q*, q*/q) is above this."""


class ArmResult(NamedTuple):
    """A result has an arm's seeds, and its effects."""

    arm: Arm
    seeds: list[Seed]
    answers: bool
    held_out: Effect | None
    """Final held-out accuracy less that of the baseline; None for a baseline."""
    delay: Ratio | None
    """Ratio of its delay to that of the baseline."""
    beside_controls: dict[str, Effect]
    """Final held-out accuracy less that of each control of the same size."""
    share_of_ceiling: float | None
    """Largest share of the ceiling that a seed has at the end, for a pushed arm."""
    off_level: float | None
    """Median of max(q/q*, q*/q) over seeds and the second half of the time that a held arm was held."""
    remarks: list[str]


def arm_results(
    arms: Sequence[Arm],
    of_arms: Mapping[str, Sequence[Sequence[Record]]],
    *,
    num_classes: int,
    bounds: Bounds,
    resolution: int,
) -> list[ArmResult]:
    """Return the results from the records of each arm's seeds."""
    seeds = {arm.name: [outcome(records) for records in of_arms[arm.name]] for arm in arms}
    results = []
    for arm in arms:
        own, reference = seeds[arm.name], seeds[BASELINE.name]
        accuracy = at_the_end(own, "held_out_accuracy")
        is_baseline = arm == BASELINE
        share = None
        if is_pushed(arm) and arm.rule.quantity:
            top = bounds.ceiling(arm.rule.quantity, num_classes)
            name = "softened_ncc" if arm.rule.quantity == "ncc" else RECORDED[arm.rule.quantity]
            share = float(np.max(at_the_end(own, f"train_{name}"))) / top
        off_level = off_level_of(arm, of_arms[arm.name]) if arm.rule.is_held else None
        results.append(
            ArmResult(
                arm,
                own,
                answers(own),
                None if is_baseline else effect(accuracy, at_the_end(reference, "held_out_accuracy")),
                None if is_baseline else delay_ratio(own, reference, resolution),
                {
                    each.name: effect(accuracy, at_the_end(seeds[each.name], "held_out_accuracy"))
                    for each in arms
                    if each.control_of == arm.name
                },
                share,
                off_level,
                remarks(own, share, off_level),
            )
        )
    return results


def is_pushed(arm: Arm) -> bool:
    """Say whether an arm is pushed until the end."""
    return arm.rule.quantity is not None and not arm.rule.is_held and arm.rule.control is None and arm.until is None


def off_level_of(arm: Arm, of_seeds: Sequence[Sequence[Record]]) -> float:
    assert arm.rule.quantity is not None
    name = f"train_{RECORDED[arm.rule.quantity]}"
    factors = []
    for records in of_seeds:
        middle = (arm.since + records[-1]["step"]) / 2
        values = [number(record[name]) for record in records if record["step"] >= middle]
        factors += np.exp(np.abs(np.log(np.array(values) / arm.level))).tolist()
    return float(np.median(factors))


def remarks(seeds: Sequence[Seed], share_of_ceiling: float | None, off_level: float | None) -> list[str]:
    said = []
    diverged = [seed.diverged for seed in seeds if seed.diverged is not None]
    if diverged:
        said.append(f"NaN in {len(diverged)} of {len(seeds)}, first at step {min(diverged)}")
    if not answers(seeds):
        said.append(f"does not answer: below {FITTED:.0%} on what it is trained on")
    if share_of_ceiling is not None and share_of_ceiling >= AT_THE_CEILING:
        said.append("at its ceiling")
    if off_level is not None and not off_level <= NOT_HELD:
        said.append(f"not held: off by ×{off_level:.2g}")
    return said


def table(results: Sequence[ArmResult]) -> str:
    """Format a row per arm, and a legend of the columns."""
    cells = [
        ["", "train, %", "held out, %", "less baseline, %", "d", "delay", "n", "× baseline's", "κ", "κ̂", "NCC",
         "train loss", "of ceiling", ""]
    ]  # fmt: skip
    for each in results:
        delays = [seed.delay for seed in each.seeds if seed.delay is not None]
        cells.append(
            [
                each.arm.name,
                f"{100 * min(at_the_end(each.seeds, 'train_accuracy')):.1f}",
                _plus_minus(interval([100 * value for value in at_the_end(each.seeds, "held_out_accuracy")])),
                "" if each.held_out is None else _plus_minus(_percent(each.held_out.difference), sign="+"),
                ""
                if each.held_out is None or math.isnan(each.held_out.standardised)
                else f"{each.held_out.standardised:+.1f}",
                f"{'≥ ' if any(seed.is_censored for seed in each.seeds) else ''}{np.median(delays):.0f}"
                if delays
                else "",
                f"{sum(not seed.is_censored for seed in each.seeds)}/{len(each.seeds)}",
                _ratio(each.delay),
                *(f"{np.median(at_the_end(each.seeds, f'train_{name}')):.2g}" for name in RECORDED.values()),
                f"{np.median(at_the_end(each.seeds, 'train_loss')):.2g}",
                "" if each.share_of_ceiling is None else f"{each.share_of_ceiling:.2g}",
                "; ".join(each.remarks),
            ]
        )
    num_seeds = len(results[0].seeds)
    lines = [aligned(cells), "", *_beside_controls(results)]
    return "\n".join(line.rstrip() for line in [*lines, _EXPLAINED.format(num_seeds)])


_EXPLAINED = """
train: the lowest of {} seeds at the end. ±: 95 % intervals over seeds, of differences paired by seed; d: the mean of
these over their standard deviation. delay: median of the steps from 99 % of what is trained on to 99 % of what is held
out, ≥ if not all seeds got there (n did); × baseline's: the geometric mean of the ratios, with its 95 % interval, or ≥
or ≤ a bound. κ, κ̂, NCC, loss: medians, of what is trained on, at the end; larger κ and κ̂ are sharper, and an NCC of 0
is collapsed (it is a spread of the classes, not the accuracy of nearest class centres). of ceiling: the highest of the
seeds, as a share of what the bounds allow."""


def _beside_controls(results: Sequence[ArmResult]) -> list[str]:
    rows = [
        [
            f"{each.arm.name}, less {control.removesuffix(' as ' + each.arm.name)}",
            _plus_minus(_percent(its.difference), "+"),
        ]
        for each in results
        for control, its in each.beside_controls.items()
    ]
    return [aligned([["beside controls of the same size", "held out, %"], *rows]), ""] if rows else []


def _percent(values: Interval) -> Interval:
    return Interval(100 * values.mean, 100 * values.half_width)


def _plus_minus(values: Interval, sign: str = "") -> str:
    return f"{values.mean:{sign}.1f} ± {values.half_width:.1f}"


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None or ratio.bound == "?":
        return ""
    if ratio.bound:
        return f"{ratio.bound} {ratio.ratio:.2g}"  # how far beyond it may be, nobody knows
    return f"{ratio.ratio:.2g} [{ratio.low:.2g}, {ratio.high:.2g}]"


def to_summary(results: Sequence[ArmResult]) -> Record:
    """Return numbers by the names of the arms, with one per seed where a table shows only one of them."""
    return {
        each.arm.name: {
            "arm": each.arm,
            "answers": each.answers,
            "remarks": each.remarks,
            "seeds": each.seeds,
            "delays": [seed.delay for seed in each.seeds],
            "held_out_accuracy": interval(at_the_end(each.seeds, "held_out_accuracy")),
            "held_out_less_baseline": each.held_out,
            "held_out_less_controls": each.beside_controls,
            "delay_to_baseline": each.delay,
            "share_of_ceiling": each.share_of_ceiling,
            "off_level": each.off_level,
        }
        for each in results
    }
