"""Figures of interventions show every arm over training, what a level does, and the delay of generalization by arm."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import NullFormatter

from flatjax.run.records import Record, number
from harness.interventions.arm_results import ArmResult
from harness.interventions.arms import BASELINE, QUANTITIES, SYMBOLS, Arm
from harness.interventions.outcomes import at_the_end
from harness.results.intervals import interval
from harness.results.style import plt, tidy

_PANELS = {
    "accuracy": "accuracy (dashed: trained on)",
    "relative_flatness": "κ, trained on (larger is sharper)",
    "ncc": "NCC, trained on (0 is collapsed)",
}
_STYLE = {"font.size": 9}
_ANSWERS, _DOES_NOT, _BASELINE = "#0b4f8a", "#d1600f", "0.35"


def groups_of(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    """Group the arms by the figure's columns, with the baseline in each."""
    groups: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.rule.quantity is None:
            continue
        symbol = SYMBOLS[arm.rule.quantity]
        if arm.rule.is_held:
            title = f"{symbol} held"
        elif arm.rule.control is not None:
            title = f"controls, as {arm.control_of}"
        elif arm.until is not None:
            title = "unplugged"
        else:
            title = f"{symbol} pushed"
        groups.setdefault(title, [BASELINE]).append(arm)
    return groups


def draw_training(folder: Path, arms: Sequence[Arm], of_arms: Mapping[str, Any], title: str) -> None:
    """Draw `training-held.png`, `training-pushed.png` and `training-controls.png`, each if it has arms."""
    kinds: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.rule.quantity is not None:
            kind = "held" if arm.rule.is_held else "pushed" if arm.rule.control is None else "controls"
            kinds.setdefault(kind, [BASELINE]).append(arm)
    for kind, of_kind in kinds.items():
        _draw_curves(folder / f"training-{kind}.png", of_kind, of_arms, title)


def _draw_curves(path: Path, arms: Sequence[Arm], of_arms: Mapping[str, Any], title: str) -> None:
    """Draw medians over seeds, with bands from the lowest to the highest: a column per group and a colour per arm."""
    groups = groups_of(arms)
    with plt.rc_context(_STYLE):
        figure, all_axes = plt.subplots(
            len(_PANELS), len(groups), squeeze=False, sharex=True, sharey="row",
            figsize=(3.1 * len(groups) + 0.6, 7.4), layout="constrained", dpi=150,
        )  # fmt: skip
        for column, (name, members) in zip(all_axes.T, groups.items(), strict=True):
            for place, arm in enumerate(members):
                is_baseline = arm == BASELINE
                colour = (
                    "black" if is_baseline else plt.get_cmap("plasma")(0.85 * (place - 1) / max(len(members) - 2, 1))
                )
                for axes, quantity in zip(column, _PANELS, strict=True):
                    label = _short(arm)
                    if quantity == "accuracy":
                        _curve(axes, of_arms[arm.name], "train_accuracy", colour, None, dashed=True)
                        _curve(axes, of_arms[arm.name], "held_out_accuracy", colour, label)
                    else:
                        _curve(axes, of_arms[arm.name], f"train_{quantity}", colour, None)
                if arm.until is not None:
                    for axes in column:
                        axes.axvline(arm.until, color="0.5", linewidth=0.8, linestyle=(0, (4, 3)))
            column[0].set_title(name, fontsize=8)
            column[0].legend(frameon=False, fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.12))
            column[-1].set(xlabel="step", xscale="log")
            column[-1].xaxis.set_minor_formatter(NullFormatter())
        for (quantity, label), row in zip(_PANELS.items(), all_axes, strict=True):
            row[0].set_ylabel(label)
            for axes in row:
                axes.set_yscale("linear" if quantity == "accuracy" else "log")
                tidy(axes)
        figure.suptitle(f"{title}; black: baseline; bands: lowest to highest seed", fontsize=10)
        figure.savefig(path)
    plt.close(figure)


def _short(arm: Arm) -> str:
    return arm.name.removesuffix(f" as {arm.control_of}")


def _curve(
    axes: Any, runs: Sequence[Sequence[Record]], key: str, colour: Any, label: str | None, *, dashed: bool = False
) -> None:
    """Draw a curve from the second measurement on, as a log axis has no 0, until the network diverges."""
    steps = np.array([record["step"] for record in runs[0]])[1:]
    values = np.array([[number(record[key]) for record in run] for run in runs])[:, 1:]
    some = np.isfinite(values).any(axis=0)
    steps, values = steps[some], values[:, some]
    if not len(steps):
        return
    style = {"color": colour, "linestyle": "--" if dashed else "-", "linewidth": 0.7 if dashed else 1.2}
    axes.plot(steps, np.nanmedian(values, axis=0), label=label, **style)
    if not dashed:
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)


def draw_dose_response(path: Path, results: Sequence[ArmResult], title: str) -> None:
    """Draw delay, final held-out accuracy and training loss against the level held, with a point per seed."""
    held = [q for q in QUANTITIES if any(each.arm.rule.is_held and each.arm.rule.quantity == q for each in results)]
    if not held:
        return
    rows = _LABELS if generalizes(results) else _LABELS[1:]
    with plt.rc_context(_STYLE):
        figure, all_axes = plt.subplots(
            len(rows), len(held), squeeze=False, sharex="col", sharey="row", figsize=(3.4 * len(held) + 0.6, 6.8),
            layout="constrained", dpi=150,
        )  # fmt: skip
        for column, quantity in zip(all_axes.T, held, strict=True):
            for each in (each for each in results if each.arm.rule.is_held and each.arm.rule.quantity == quantity):
                colour = _ANSWERS if each.answers else _DOES_NOT
                _seeds(column, each, colour)
                for axes, values in zip(column, _values(each)[-len(rows) :], strict=True):
                    mean, *reach = _mean(values, is_log=axes is column[-1])
                    style = {"fmt": "s", "markersize": 5, "color": colour, "capsize": 3, "linewidth": 1.2}
                    axes.errorbar(each.arm.level, mean, np.array(reach)[:, None], **style)
            plain = next(each for each in results if each.arm == BASELINE)
            for axes, values in zip(column, _values(plain)[-len(rows) :], strict=True):
                mean, *_ = _mean(values, is_log=axes is column[-1])
                axes.axhline(mean, color=_BASELINE, linewidth=0.9, linestyle=(0, (4, 3)))
            column[0].set_title(f"{SYMBOLS[quantity]} held")
            column[-1].set(xlabel=f"{SYMBOLS[quantity]}*", xscale="log")
        for row, label in zip(all_axes, rows, strict=True):
            row[0].set_ylabel(label)
            for axes in row:
                tidy(axes)
        all_axes[-1, 0].set_yscale("log")
        never = "▲: not generalized by then" if len(rows) == len(_LABELS) else "no network generalized to 99 %"
        figure.suptitle(
            f"{title}; orange: training set not fitted; {never};\n"
            "squares: means, of losses geometric, 95 % intervals; dashed: baseline",
            fontsize=9,
        )
        figure.savefig(path)
    plt.close(figure)


_LABELS = ("delay of generalization, steps", "held-out accuracy at the end", "training loss at the end")


def generalizes(results: Sequence[ArmResult]) -> bool:
    """Say whether any network generalized; else there is no delay to draw."""
    return any(not seed.is_censored for each in results for seed in each.seeds)


def _mean(values: Sequence[float], *, is_log: bool) -> tuple[float, float, float]:
    """Return the mean, and how far its interval reaches below and above."""
    if not is_log:
        mean, reach = interval(values)
        return mean, reach, reach
    mean, reach = interval(np.log(values).tolist())
    return math.exp(mean), math.exp(mean) - math.exp(mean - reach), math.exp(mean + reach) - math.exp(mean)


def _values(each: ArmResult) -> tuple[list[float], list[float], list[float]]:
    delays = [np.nan if seed.delay is None else float(seed.delay) for seed in each.seeds]
    return delays, at_the_end(each.seeds, "held_out_accuracy"), at_the_end(each.seeds, "train_loss")


def _seeds(column: Sequence[Any], each: ArmResult, colour: str) -> None:
    beside = each.arm.level * np.geomspace(0.88, 1.14, len(each.seeds))
    panels = list(zip(_values(each), (True, False, False), strict=True))[-len(column) :]
    for axes, (values, marks) in zip(column, panels, strict=True):
        for x, y, seed in zip(beside, values, each.seeds, strict=True):
            shape = "^" if marks and seed.is_censored else "o"
            axes.plot(x, y, shape, markersize=3, color=colour, alpha=0.55, markeredgewidth=0)


def draw_delays(path: Path, results: Sequence[ArmResult], title: str) -> None:
    """Draw a row per arm and a point per seed; a network that never generalized stands at the right of its row."""
    has_delays = generalizes(results)
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(
            1, 1 + has_delays, sharey=True, squeeze=False, figsize=(9.6, 0.24 * len(results) + 1.4),
            layout="constrained", dpi=150,
        )  # fmt: skip
        left, right = panels[0, 0], panels[0, -1]
        for place, each in enumerate(results):
            is_baseline = each.arm == BASELINE
            colour = _BASELINE if is_baseline else _ANSWERS if each.answers else _DOES_NOT
            delays, accuracies, _ = _values(each)
            for delay, accuracy, seed in zip(delays, accuracies, each.seeds, strict=True):
                if has_delays:
                    left.plot(delay, place, ">" if seed.is_censored else "o", color=colour, markersize=3.5, alpha=0.7)
                right.plot(100 * accuracy, place, "o", color=colour, markersize=3.5, alpha=0.7)
            mean, reach = interval([100 * value for value in accuracies])
            right.errorbar(mean, place, xerr=reach, fmt="|", color=colour, markersize=8, capsize=2.5, linewidth=1.1)
        left.set_yticks(range(len(results)), [each.arm.name for each in results], fontsize=7.5)
        left.invert_yaxis()
        left.set_xlabel("delay of generalization, steps (>: not by then)")
        right.set_xlim(max(0, right.get_xlim()[0]), 101)
        right.set_xlabel("held-out accuracy at the end, % (mean, 95 %)")
        for axes in (left, right):
            tidy(axes)
        figure.suptitle(f"{title}; grey: baseline; orange: training set not fitted, which answers nothing", fontsize=9)
        figure.savefig(path)
    plt.close(figure)
