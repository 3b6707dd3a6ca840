"""Figures of neural collapse show measures by epoch, and by layer at several epochs."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from flatjax.run.records import Record
from harness.results.figures import COLOURS, draw_curve
from harness.results.style import plt, tidy


class Case(NamedTuple):
    """A case is one kind of network, trained in one way with several seeds."""

    name: str
    runs: list[list[Record]]
    fitted: list[int | None]
    """Epoch of each seed at which the training error is 0."""
    squared_error: bool
    """Whether the squared error is trained with, so that its parts are shown."""


_DEEP, _WARM, _GREEN, _VIOLET = COLOURS["train"], COLOURS["held_out"], "#2f7d4f", "#7b4fa3"

_CURVES: dict[str, list[tuple[str, str, str, str]]] = {
    "variability": [
        ("nc1", "NC1", _DEEP, "-"),
        ("cdnv", "CDNV", _WARM, "-"),
        ("test_cdnv", "CDNV, held out", _WARM, "--"),
    ],
    "geometry": [
        ("nc2_equinorm_means", "NC2 norms", _DEEP, "-"),
        ("nc2_equiangularity_means", "NC2 angles", _WARM, "-"),
        ("nc3", "NC3", _GREEN, "-"),
    ],
    "squared error": [
        ("squared_error_nc1", "of the spread, NC1", _DEEP, "-"),
        ("squared_error_nc2_and_nc3", "of the means, NC2/3", _WARM, "-"),
        ("squared_error_perpendicular", "of the head, ⊥", _GREEN, "-"),
    ],
}
_LABELS = {
    "variability": "spread of the classes\n(0 is collapsed)",
    "geometry": "distance to the frame\n(0 is collapsed)",
    "squared error": "part of the squared error",
}


def draw(path: Path, cases: list[Case], title: str) -> None:
    """Draw a column per case: errors and NC4, the metrics by epoch, CDNV by layer, and the parts of the squared error.

    The dashed line is where the training error becomes 0. With several seeds, curves are medians with ranges; by layer
    they are those of the first seed.
    """
    rows = ["error", "variability", "geometry", "layers"]
    rows += ["squared error"] if any(case.squared_error for case in cases) else []
    with plt.rc_context({"font.size": 8}):
        figure, all_axes = plt.subplots(
            len(rows), len(cases), squeeze=False, sharey="row", figsize=(2.9 * len(cases) + 0.6, 2 * len(rows) + 0.5),
            layout="constrained", dpi=170,
        )  # fmt: skip
        for column, case in enumerate(cases):
            for row, axes in zip(rows, all_axes[:, column], strict=True):
                if row == "squared error" and not case.squared_error:
                    axes.set_visible(False)
                    continue
                _draw_panel(axes, row, case)
                tidy(axes)
            all_axes[0, column].set_title(case.name, fontsize=9)
        for row, axes in zip(rows, all_axes, strict=True):
            shown = [each for each in axes if each.get_visible()]
            shown[0].set_ylabel(
                {"error": "share of the images", "layers": "CDNV by layer\n(0 is collapsed)"}.get(row) or _LABELS[row]
            )
            shown[0].tick_params(labelleft=True)
            for each in shown if row == "layers" else shown[:1]:
                each.legend(frameon=False, fontsize=6.5)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path)
    plt.close(figure)


def _draw_panel(axes: Axes, row: str, case: Case) -> None:
    if row == "layers":
        _draw_layers(axes, case.runs[0])
        return
    if row == "error":
        runs = [[record | _errors(record) for record in run] for run in case.runs]
        draw_curve(axes, runs, "train_error", _DEEP, "wrong, trained on", against="epoch")
        draw_curve(axes, runs, "test_error", _WARM, "wrong, held out", against="epoch")
        draw_curve(axes, runs, "nc4", _GREEN, "not as the nearest mean", style=":", against="epoch")
    else:
        for key, name, colour, style in _CURVES[row]:
            draw_curve(axes, case.runs, key, colour, name, style=style, against="epoch")
        axes.set_yscale("log")
    reached = [epoch for epoch in case.fitted if epoch is not None]
    if reached:
        axes.axvline(float(np.median(reached)), color="0.45", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xscale="log", xlabel="epoch")


def _errors(record: Record) -> Record:
    return {f"{part}_error": 1 - record[f"{part}_accuracy"] for part in ("train", "test")}


def _draw_layers(axes: Axes, records: list[Record]) -> None:
    """Draw layers from the input on, at the start and at some epochs: the later, the darker."""
    chosen = sorted({*np.linspace(0, len(records) - 1, min(6, len(records))).round().astype(int)})
    for place, i in enumerate(chosen):
        layers = records[i]["layers"]
        values = [np.nan if layer["cdnv"] is None else float(layer["cdnv"]) for layer in layers.values()]
        colour = plt.get_cmap("viridis_r")(0.1 + 0.85 * place / max(len(chosen) - 1, 1))
        label = f"epoch {records[i]['epoch']}"
        axes.plot(range(len(values)), values, "o-", color=colour, linewidth=1.1, markersize=2.2, label=label)
    names = list(records[0]["layers"])
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=6)
    axes.set_yscale("log")
