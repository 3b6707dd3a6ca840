"""Draw the figures of a diagnosis, with a function per section, as SVG in the colour of the text around it."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from flatjax.diagnosis.page.words import COLLAPSE, FLATNESS, GEOMETRY, JACOBIANS, LOSS, TRAJECTORY, Word
from flatjax.run.records import Record

_INK = "#123456"
"""This colour stands for that of the text, which is not known here."""
_EARLY_TO_LATE = LinearSegmentedColormap.from_list("early to late", ["#4c8be8", "#a364c8", "#ee7733"])
_ONE = "#e0662f"

_STYLE = {
    "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "diagnosis", "text.color": _INK, "axes.edgecolor": _INK,
    "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 9, "axes.facecolor": "none",
    "figure.facecolor": "none", "grid.color": _INK, "grid.alpha": 0.2, "grid.linewidth": 0.5, "axes.linewidth": 0.6,
}  # fmt: skip


def of_loss(checkpoints: Sequence[Record]) -> str | None:
    """Draw the loss, κ and κ̂ of the head against the training step."""
    return _over_steps(checkpoints, [LOSS[0], *FLATNESS[:2]])


def of_profile(checkpoints: Sequence[Record]) -> str | None:
    """Draw a panel per kind of kernel over the blocks; the last panel is the head, over the checkpoints."""
    shown = _with_part(checkpoints, "profile")
    if not shown:
        return None
    layers = shown[-1]["parts"]["profile"]["layer_kappa"]["layers"]
    kinds = list(dict.fromkeys(_kind(name) for name in layers))

    def draw(axes: Axes, kind: str) -> None:
        everything = []
        for checkpoint, colour in zip(shown, _colours(len(shown)), strict=True):
            record = checkpoint["parts"]["profile"]["layer_kappa"]
            chosen = [i for i, name in enumerate(record["layers"]) if _kind(name) == kind]
            values, errors = (_floats(record[each])[chosen] for each in ("value", "standard_error"))
            at = [_block(record["layers"][i]) for i in chosen]
            if at == [None]:
                at = [shown.index(checkpoint)]
            _line(axes, at, values, errors, colour, _label(checkpoint))
            everything.append(values)
        values = np.concatenate(everything)
        sizes = np.abs(values[np.isfinite(values) & (values != 0)])
        if len(sizes) and sizes.max() > _MANY_TIMES * np.median(sizes):
            axes.set_yscale("symlog", linthresh=10.0 ** np.ceil(np.log10(np.median(sizes))))
        axes.set_title(kind)
        if kind in layers:  # it has no block
            axes.set_xticks([])
            axes.set_xlabel("checkpoint" if len(shown) > 1 else "")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel("block")

    return _panels(kinds, draw, shown, columns=4, size=(2.15, 1.9))


def of_collapse(checkpoints: Sequence[Record]) -> str | None:
    """Draw measures of collapse against the training step."""
    return _over_steps(checkpoints, [COLLAPSE[0], COLLAPSE[1], COLLAPSE[2], COLLAPSE[3], COLLAPSE[5], COLLAPSE[7]])


def of_geometry(checkpoints: Sequence[Record]) -> str | None:
    """Draw the measures by layer, and the spectra of the last checkpoint."""
    shown = _with_part(checkpoints, "geometry")
    if not shown:
        return None
    last = shown[-1]["parts"]["geometry"]

    def draw(axes: Axes, panel: Word | None) -> None:
        if panel is None:
            _draw_spectra(axes, last["variances"])
            axes.set_title("variances of " + ("the last" if len(shown) > 1 else "all layers"))
            return
        for checkpoint, colour in zip(shown, _colours(len(shown)), strict=True):
            record = checkpoint["parts"]["geometry"][panel.name]
            values, errors = _floats(record["value"]), _floats(record["standard_error"])
            _line(axes, range(len(values)), values, errors, colour, _label(checkpoint))
        _name_layers(axes, last[panel.name]["layers"])
        axes.set_title(panel.label)
        if not np.isfinite(_floats(last[panel.name]["value"])).any():
            axes.text(
                0.5, 0.5, "too narrow for the\nrange of the fit", ha="center", transform=axes.transAxes, fontsize=8
            )

    return _panels([*GEOMETRY, None], draw, shown, columns=3, size=(2.85, 2.1))


def of_trajectory(checkpoints: Sequence[Record]) -> str | None:
    """Draw the size of the stream by layer, and the scores over training."""
    shown = _with_part(checkpoints, "trajectory")
    if not shown:
        return None
    words = [each for each in TRAJECTORY if each.name in shown[-1]["parts"]["trajectory"]] if len(shown) > 1 else []

    def draw(axes: Axes, word: Word | None) -> None:
        if word is not None:
            _draw_steps(axes, shown, word)
            return
        for checkpoint, colour in zip(shown, _colours(len(shown)), strict=True):
            record = checkpoint["parts"]["trajectory"]["norms"]
            values = _floats(record["value"])
            _line(axes, range(len(values)), values, _floats(record["standard_error"]), colour, _label(checkpoint))
        _name_layers(axes, shown[-1]["parts"]["trajectory"]["norms"]["layers"])
        _make_log(axes, "y")
        axes.set_title("size ‖x‖ of the stream")

    return _panels([None, *words], draw, shown, columns=3, size=(2.85, 2.1))


def of_jacobians(checkpoints: Sequence[Record]) -> str | None:
    """Draw the alignment of all pairs of blocks in the last checkpoint, and the singular values by block."""
    shown = _with_part(checkpoints, "jacobians")
    if not shown:
        return None
    last = shown[-1]["parts"]["jacobians"]
    panels: list[Any] = ["coupling_matrix", "alignment_matrix", "singular_values"]
    panels += JACOBIANS[:2] if len(shown) > 1 else []

    def draw(axes: Axes, panel: Any) -> None:
        if isinstance(panel, Word):
            _draw_steps(axes, shown, panel)
        elif panel == "singular_values":
            for checkpoint, colour in zip(shown, _colours(len(shown)), strict=True):
                record = checkpoint["parts"]["jacobians"]["singular_values"]
                values, errors = (_floats(record[each])[:, 0] for each in ("value", "standard_error"))
                _line(axes, range(len(values)), values, errors, colour, _label(checkpoint))
            axes.set(title="largest singular value σ₁", xlabel="block")
            _make_log(axes, "y")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            _draw_matrix(axes, _floats(last[panel]["value"]))
            axes.set_title(
                {"coupling_matrix": "block coupling m(Jᵢ, Jⱼ)", "alignment_matrix": "alignment RA2 of i and j"}[panel]
            )

    return _panels(panels, draw, shown, columns=3, size=(2.85, 2.5))


def of_sharpness(checkpoints: Sequence[Record]) -> str | None:
    """Draw the rise of the loss against ε."""
    shown = _with_part(checkpoints, "sharpness")
    if not shown:
        return None

    def draw(axes: Axes, _: Any) -> None:
        for checkpoint, colour in zip(shown, _colours(len(shown)), strict=True):
            record = checkpoint["parts"]["sharpness"]["rise"]
            values = _floats(record["value"])
            _line(axes, record["radii"], values, _floats(record["standard_error"]), colour, _label(checkpoint))
        axes.set(xscale="log", yscale="log", xlabel="ε", title="rise of the loss, in nats")

    return _panels([None], draw, shown, columns=1, size=(3.6, 2.5))


def of_cost(checkpoints: Sequence[Record]) -> str | None:
    """Draw the forward passes of each part, in the last checkpoint."""
    parts = {name: each["forward_passes"] for name, each in checkpoints[-1]["cost"]["parts"].items()}

    def draw(axes: Axes, _: Any) -> None:
        places = np.arange(len(parts))
        axes.barh(places, list(parts.values()), color=_ONE, height=0.7)
        axes.set_yticks(places, list(parts))
        axes.invert_yaxis()
        axes.set_xlabel("forward passes on all tokens")

    return _panels([None], draw, [], columns=1, size=(5.2, 0.24 * len(parts) + 0.7))


def _over_steps(checkpoints: Sequence[Record], words: Sequence[Word]) -> str | None:
    words = [word for word in words if any(word.name in each["parts"].get(word.part, {}) for each in checkpoints)]
    if len(checkpoints) < 2 or not words:
        return None
    return _panels(words, lambda axes, word: _draw_steps(axes, checkpoints, word), [], columns=3, size=(2.85, 2.0))


def _draw_steps(axes: Axes, checkpoints: Sequence[Record], word: Word) -> None:
    """Draw curves over the steps of training, or over the checkpoints where the steps are not known."""
    records = [each["parts"].get(word.part, {}).get(word.name, {}) for each in checkpoints]
    values = _floats([record.get("value") for record in records])
    errors = _floats([record.get("standard_error") for record in records])
    steps = [each["step"] for each in checkpoints]
    axes.set_title(word.label)
    if None in steps or len({*steps}) < len(steps):
        axes.errorbar(range(len(values)), values, errors, fmt="o", color=_ONE, markersize=3.5, linewidth=1)
        axes.set_xticks(range(len(values)), [_label(each) for each in checkpoints], rotation=30, ha="right", fontsize=7)
        return
    _line(axes, steps, values, errors, _ONE, "")
    axes.set_xlabel("step of training")


def _draw_spectra(axes: Axes, record: Record) -> None:
    values, ranks, layers = _floats(record["value"]), record["ranks"], record["layers"]
    for place, (name, each) in enumerate(zip(layers, values, strict=True)):
        colour = _EARLY_TO_LATE(place / max(len(layers) - 1, 1))
        label = name if place in (0, len(layers) - 1) else None
        axes.plot(ranks, np.where(each > 0, each, np.nan), color=colour, linewidth=1, label=label)
    axes.set(xscale="log", yscale="log", xlabel="rank of the direction")
    axes.legend(frameon=False, fontsize=7)


def _draw_matrix(axes: Axes, values: np.ndarray) -> None:
    number = len(values)
    values = np.where(np.eye(number, dtype=bool), np.nan, values)
    lowest, highest = 0.0, max(1.0, float(np.nanmax(values)) if np.isfinite(values).any() else 1.0)
    mesh = axes.pcolormesh(values, cmap="cividis_r", vmin=lowest, vmax=highest)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    centres, names = np.arange(number) + 0.5, np.arange(number)
    every = slice(None, None, max(1, number // 8))
    axes.set_xticks(centres[every], names[every])
    axes.set_yticks(centres[every], names[every])
    axes.set(xlabel="j", ylabel="i")
    axes.grid(visible=False)
    if number > _MOST_NUMBERS:
        plt.colorbar(mesh, ax=axes, shrink=0.8, pad=0.03).outline.set_visible(False)
    else:
        for i in range(number):
            for j in range(number):
                if np.isfinite(values[i, j]):
                    colour = "white" if values[i, j] > (lowest + highest) / 2 else "black"
                    axes.text(
                        j + 0.5, i + 0.5, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=6, color=colour
                    )


_MOST_NUMBERS = 8


def _panels(
    panels: Sequence[Any], draw: Callable[[Axes, Any], None], lines: Sequence[Record], *, columns: int,
    size: tuple[float, float],
) -> str:  # fmt: skip
    """Make a grid of panels with one legend of the checkpoints that are lines in it."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            rows, columns, squeeze=False, figsize=(size[0] * columns, size[1] * rows + 0.35 * (len(lines) > 1)),
            layout="constrained",
        )  # fmt: skip
        for axes, panel in zip(grid.flat, panels, strict=False):
            axes.grid(linewidth=0.5)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            draw(axes, panel)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        if len(lines) > 1:
            handles, labels = next(axes.get_legend_handles_labels() for axes in grid.flat if axes.get_legend() is None
                                   and len(axes.get_legend_handles_labels()[1]) == len(lines))  # fmt: skip
            ncols = min(3 * columns, len(lines))  # as many as there is room for
            figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=7)
        return _svg(figure)


def _line(axes: Axes, at: Any, values: np.ndarray, errors: np.ndarray, colour: Any, label: str) -> None:
    shown = np.where(np.isfinite(errors), errors, 0)
    axes.errorbar(
        at, values, shown, color=colour, linewidth=1.2, elinewidth=0.8, marker="o", markersize=2.6, label=label
    )


def _make_log(axes: Axes, axis: str) -> None:
    """Make an axis logarithmic, with labels that are numbers: 0.5, 1, 2."""
    getattr(axes, f"set_{axis}scale")("log")
    low, high = sorted(getattr(axes, f"get_{axis}lim")())
    subs = (1.0,) if high > _DECADES * low else (1.0, 2.0, 5.0)
    which = getattr(axes, f"{axis}axis")
    which.set_major_locator(LogLocator(subs=subs))
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_formatter(NullFormatter())


_DECADES, _MANY_TIMES = 300, 10


def _svg(figure: Figure) -> str:
    """Return the figure for a page: without prologue or names of other places, in the colour of the text."""
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None})
    plt.close(figure)
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    sized = r'<svg \1style="width:\2pt;min-width:min(\2pt,30rem)" role="img"'
    svg = re.sub(r'<svg ([^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', sized, svg)
    return svg.replace(_INK, "currentColor")


def _name_layers(axes: Axes, names: Sequence[str]) -> None:
    every = max(1, -(-len(names) // 8))
    places = [*range(0, len(names), every)]
    short = {"embedding": "emb.", "head": "head"}
    axes.set_xticks(places, [short.get(names[i], names[i].removeprefix("block ")) for i in places])
    axes.set_xlabel("after block")


def _with_part(checkpoints: Sequence[Record], part: str) -> list[Record]:
    return [each for each in checkpoints if part in each["parts"]]


def _colours(number: int) -> list[Any]:
    return [_ONE] if number == 1 else [_EARLY_TO_LATE(i / (number - 1)) for i in range(number)]


def _label(checkpoint: Record) -> str:
    return checkpoint["label"]


def _kind(name: str) -> str:
    return "/".join(each for each in name.split("/") if not each.isdigit()).removeprefix("blocks/")


def _block(name: str) -> int | None:
    return next((int(each) for each in name.split("/") if each.isdigit()), None)


def _floats(values: Any) -> np.ndarray:
    """Return floats, with NaN for null, as JSON has no NaN."""
    return np.array(values, dtype=float)
