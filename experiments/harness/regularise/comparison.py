"""Compare methods over seeds they have in common: intervals, paired differences, a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flatjax.run.records import Record
from flatjax.run.tables import aligned
from harness.results.intervals import Interval, is_clear
from harness.results.style import plt, tidy


class Row(NamedTuple):
    """A row is a method in its best setting on one task; all but the cost are intervals over seeds."""

    name: str
    setting: Record
    """Learning rate and strength, or None for what has none."""
    edges: Record
    """Each is "lowest" or "highest" if the value is that of those tried, else ""."""
    accuracy: Interval
    gain: Interval | None
    """Gain in accuracy over the baseline, paired by seed; None for the baseline."""
    train_accuracy: Interval
    train_loss: Interval
    kappa: Interval
    seconds: float
    """Seconds for a step."""
    ratio: float
    """Ratio of a step's time to the baseline's, taken in turns."""


def table(rows: Sequence[Row]) -> str:
    """Format a table with a row per method."""
    cells = [["", "rate", "strength", "test accuracy, %", "gain, %", "train acc., %", "train loss", "κ", "ms a step"]]
    for row in rows:
        cells.append(
            [
                row.name,
                *(_setting(row, key) for key in ("learning_rate", "strength")),
                f"{100 * row.accuracy.mean:.2f} ± {100 * row.accuracy.half_width:.2f}",
                "" if row.gain is None else _gain(row.gain),
                f"{100 * row.train_accuracy.mean:.1f}",
                f"{row.train_loss.mean:.2g}",
                f"{row.kappa.mean:.3g} ± {row.kappa.half_width:.1g}",
                f"{1e3 * row.seconds:.2f} ({row.ratio:.2f}×)",
            ]
        )
    return aligned(cells)


def _setting(row: Row, key: str) -> str:
    """Format the setting, with an arrow towards what was not tried."""
    arrow = {"": "", "lowest": " ↓", "highest": " ↑"}[row.edges[key]]
    return "" if row.setting[key] is None else f"{row.setting[key]:.2g}{arrow}"


def _gain(gain: Interval) -> str:
    return f"{100 * gain.mean:+.2f} ± {100 * gain.half_width:.2f}"


def draw(path: Path, panels: Mapping[tuple[str, str], Sequence[Row]], title: str) -> None:
    """Draw a panel per model and task: accuracy with its interval by method, and its gain over the baseline."""
    models, tasks = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    height = 0.26 * max(map(len, panels.values())) + 0.75
    with plt.rc_context({"font.size": 9}):
        figure, all_axes = plt.subplots(
            len(models), len(tasks), squeeze=False, figsize=(4.4 * len(tasks), height * len(models) + 0.4),
            layout="constrained", dpi=200,
        )  # fmt: skip
        for axes, (model, task) in zip(all_axes.ravel(), [(m, t) for m in models for t in tasks], strict=True):
            _draw_panel(axes, panels[model, task])
            axes.set_title(f"{model}, {task}", fontsize=9)
        for axes in all_axes[-1]:
            axes.set_xlabel("test accuracy, %")
        figure.suptitle(title, fontsize=10)
        figure.savefig(path)
    plt.close(figure)


def _draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    def note(text: str, place: float, colour: str) -> None:
        beside = axes.get_yaxis_transform()
        axes.text(1.01, place, text, transform=beside, va="center", fontsize=7.5, color=colour)

    for place, row in enumerate(rows):
        colour = "0.25" if row.gain is None else _CLEAR if is_clear(row.gain) else _UNCLEAR
        mean, half_width = (100 * each for each in row.accuracy)
        axes.errorbar(mean, place, xerr=half_width, fmt="o", color=colour, markersize=4, linewidth=1.3, capsize=2.5)
        if row.gain is None:
            axes.axvline(mean, color="0.25", linewidth=0.8, linestyle=(0, (4, 3)))
            note("gain, ± 95 %", place, colour)
        else:
            note(_gain(row.gain), place, colour)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    tidy(axes, grid="x")


_CLEAR, _UNCLEAR = "#d1600f", "#0b4f8a"
