"""Figures of training show one line a quantity against the step, on log axes, with a band over seeds."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from flatjax.run.records import Record, number
from harness.results.style import plt, tidy

COLOURS = {"train": "#0b4f8a", "held_out": "#d1600f"}
NAMES = {"train": "trained on", "held_out": "held out"}


class Panel(NamedTuple):
    """A panel shows one quantity on the training set and on what is held out."""

    quantity: str
    label: str
    log: bool = True


def draw_training(
    path: Path, runs: list[list[Record]], panels: list[Panel], title: str, milestones: dict[str, list[int | None]]
) -> None:
    """Draw one panel below the other, with the medians of the milestones over seeds as vertical lines.

    With several runs a line is the median over them, and its band reaches from the lowest to the highest.
    """
    figure, all_axes = plt.subplots(
        len(panels), sharex=True, figsize=(6.4, 1.9 * len(panels) + 0.7), layout="constrained", dpi=200
    )
    with plt.rc_context({"font.size": 9}):
        for axes, panel in zip(all_axes, panels, strict=True):
            for part, colour in COLOURS.items():
                draw_curve(axes, runs, f"{part}_{panel.quantity}", colour, NAMES[part], since=0)
            axes.set_ylabel(panel.label)
            axes.set_yscale("log" if panel.log else "linear")
            tidy(axes)
        _draw_milestones(all_axes, milestones)
        all_axes[0].legend(frameon=False, loc="center left")
        _set_step_axis(all_axes[-1], last=min(run[-1]["step"] for run in runs))
        all_axes[0].set_title(title, pad=22)
        figure.savefig(path)
    plt.close(figure)


def draw_curve(
    axes: Axes,
    runs: list[list[Record]],
    key: str,
    colour: str,
    name: str,
    *,
    style: str = "-",
    against: str = "step",
    since: int = 1,
) -> None:
    """Draw one quantity over the steps that all runs have, from `since` on: a log axis has no 0.

    With several runs the line is the median over them, and its band reaches from the lowest to the highest.
    """
    length = min(map(len, runs))
    steps = np.array([record[against] for record in runs[0][:length]])
    values = np.array([[number(record[key]) for record in run[:length]] for run in runs])
    shown = steps >= since
    axes.plot(steps[shown], np.median(values, axis=0)[shown], style, color=colour, linewidth=1.3, label=name)
    if len(runs) > 1:
        low, high = values.min(axis=0)[shown], values.max(axis=0)[shown]
        axes.fill_between(steps[shown], low, high, color=colour, alpha=0.18, linewidth=0)


def _set_step_axis(axes: Axes, last: int) -> None:
    """Make the axis of steps linear up to about a twentieth of the last one, and logarithmic from there on.

    The first steps then take a fifth of the width, not half of it, and step 0 has a place.
    """
    linear_up_to = 10 ** max(0, math.floor(math.log10(max(last, 1) / 20)))
    axes.set_xscale("symlog", linthresh=linear_up_to, linscale=0.3, subs=range(2, 10))
    axes.xaxis.set_major_formatter(lambda step, _: f"{step:.0f}")
    axes.set_xlim(0, last)
    axes.set_xlabel("training step (linear, then log)")


def _draw_milestones(all_axes: list[Axes], milestones: dict[str, list[int | None]]) -> None:
    for name, steps in milestones.items():
        reached = [step for step in steps if step is not None]
        if not reached:
            continue
        median = float(np.median(reached))
        for axes in all_axes:
            axes.axvline(median, color="0.45", linewidth=0.8, linestyle=(0, (4, 3)))
        above = all_axes[0].get_xaxis_transform()
        all_axes[0].text(median, 1.03, name, transform=above, ha="center", va="bottom", fontsize=7.5, color="0.3")
