"""A profile is the relative flatness of all layers of a network: as a table, as bars, and over training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from flatjax.curvature import Estimate
from flatjax.layers.names import short
from flatjax.run.records import Record, number
from harness.results.style import plt, tidy

Profile = Mapping[str, Any]
"""A profile maps a layer's path to value, standard_error and num_probes, as `flatjax.flatness_profile` returns them."""

EXACT, ESTIMATED = "#0b4f8a", "#d1600f"


def from_record(record: Record) -> dict[str, Estimate]:
    """Read a profile from JSON, which has no NaN: null stands for it."""
    return {
        path: Estimate(
            np.asarray(number(each["value"])),
            np.asarray(number(each["standard_error"])),
            jnp.asarray(each["num_probes"]),
        )
        for path, each in record.items()
    }


def over_seeds(profiles: Sequence[Profile]) -> Profile:
    """Return the mean over seeds with its standard error over them; a single profile is left as it is.

    The error over seeds has that of the probes in it.
    """
    if len(profiles) == 1:
        return profiles[0]
    together = {}
    for path in profiles[0]:
        values = np.array([profile[path].value for profile in profiles], float)
        num_probes = sum(int(profile[path].num_probes) for profile in profiles)
        error = values.std(ddof=1) / math.sqrt(len(values))
        together[path] = Estimate(values.mean(), error, jnp.asarray(num_probes))
    return together


def table(profile: Profile) -> str:
    """Format a table with a row per layer."""
    width = max(len("layer"), *(len(short(path)) for path in profile))
    lines = [f"{'layer':{width}}  {'κ':>11}  {'± standard error':>16}  {'measured':>12}"]
    for path, (value, error, num_probes) in profile.items():
        how = f"{int(num_probes)} probes" if num_probes else "exactly"
        lines.append(f"{short(path):{width}}  {float(value):11.4g}  {float(error):16.2g}  {how:>12}")
    lines.append("κ is relative flatness; larger is sharper.")
    return "\n".join(lines)


def draw_profile(path: Path, profile: Profile, title: str) -> None:
    """Draw a bar per layer, the input's on top, with one standard error to either side."""
    values, errors, num_probes = (np.array([float(x) for x in each]) for each in zip(*profile.values(), strict=True))
    places = np.arange(len(values))
    with plt.rc_context({"font.size": 9}):
        figure, axes = plt.subplots(figsize=(6.4, 0.24 * len(values) + 1.3), layout="constrained", dpi=200)
        for name, colour, chosen in (
            ("exact", EXACT, num_probes == 0),
            ("estimated, ± standard error", ESTIMATED, num_probes > 0),
        ):
            if chosen.any():
                bars = {"height": 0.72, "color": colour, "alpha": 0.85, "label": name}
                error_bars = {"xerr": np.where(errors > 0, errors, np.nan)[chosen], "ecolor": "0.15", "capsize": 2}
                axes.barh(places[chosen], values[chosen], **bars, **error_bars, error_kw={"elinewidth": 0.9})
        axes.set_yticks(places, [short(name) for name in profile])
        axes.invert_yaxis()
        _scale(axes, "x", values)
        axes.set_xlabel("relative flatness κ (larger is sharper)")
        tidy(axes, grid="x")
        axes.set_axisbelow(True)
        figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=8)
        axes.set_title(title)
        figure.savefig(path)
    plt.close(figure)


def draw_history(
    path: Path, steps: Sequence[int], profiles: Sequence[Profile], accuracies: Mapping[str, Sequence[float]], title: str
) -> None:
    """Draw accuracies, and below them κ of every layer with a band of ± its error: the input's dark, the head's light.

    Steps are on a log axis, which has no 0: it is left out.
    """
    shown = np.asarray(steps) > 0
    layers = list(profiles[0])
    with plt.rc_context({"font.size": 9}):
        figure, (above, below) = plt.subplots(
            2, sharex=True, figsize=(7.2, 5.2), layout="constrained", dpi=200, height_ratios=(1, 2.4)
        )
        at = np.asarray(steps)[shown]
        for (name, values), style in zip(accuracies.items(), ("-", "--"), strict=True):
            above.plot(at, np.asarray(values)[shown], style, color="0.2", linewidth=1.2, label=name)
        everything = []
        for place, layer in enumerate(layers):
            colour = plt.get_cmap("plasma")(0.9 * place / max(len(layers) - 1, 1))
            values = np.array([float(profile[layer].value) for profile in profiles])[shown]
            errors = np.array([float(profile[layer].standard_error) for profile in profiles])[shown]
            below.plot(at, values, color=colour, linewidth=1.2, marker="o", markersize=2, label=short(layer))
            below.fill_between(at, values - errors, values + errors, color=colour, alpha=0.25, linewidth=0)
            everything.append(values)
        _scale(below, "y", np.concatenate(everything))
        below.set(xscale="log", xlabel="step", ylabel="relative flatness κ (larger is sharper)")
        above.set(ylabel="accuracy", title=title)
        for axes in (above, below):
            tidy(axes)
        above.legend(frameon=False, loc="lower right")
        columns = -(-len(layers) // 24)
        below.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7, ncols=columns)
        figure.savefig(path)
    plt.close(figure)


def _scale(axes: Axes, axis: str, values: np.ndarray) -> None:
    """Choose the scale of an axis.

    It is linear if the largest is at most ten times the smallest. Else it is logarithmic, and so on either side of 0 if
    there are negatives.
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not len(sizes) or sizes.max() <= 10 * sizes.min():
        return
    if np.nanmin(values) > 0:
        axes.set(**{f"{axis}scale": "log"})
    else:
        linear = np.log10(max(sizes.min(), 1e-3 * sizes.max()))
        getattr(axes, f"set_{axis}scale")("symlog", linthresh=10.0 ** np.floor(linear))
