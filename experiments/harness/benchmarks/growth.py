"""A cost grows with a size by the exponent of the power law that fits best, shown in a table and a figure."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.results.style import plt, tidy


class Growth(NamedTuple):
    """A growth holds what several functions cost at each of some sizes."""

    size: str
    cost: str
    sizes: Sequence[int]
    costs: Mapping[str, Sequence[float]]


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> tuple[float, float]:
    """Return the slope of log cost on log size by least squares, and its standard error, which is NaN for two sizes."""
    x, y = np.log(sizes), np.log(costs)
    x = x - x.mean()
    slope = x @ y / (x @ x)
    residuals = y - y.mean() - slope * x
    if len(x) < 3:
        return float(slope), math.nan
    return float(slope), float(np.sqrt(residuals @ residuals / (len(x) - 2) / (x @ x)))


def report_growth(path: Path, growths: Sequence[Growth], title: str) -> list[dict[str, Any]]:
    """Print the exponents, draw the figure, and return what to record."""
    rows = []
    for measured in growths:
        for name, costs in measured.costs.items():
            slope, error = exponent(measured.sizes, costs)
            print(f"{measured.cost:14} of {name:26} ~ ({measured.size.split(',')[0]})^{slope:.2f} ± {error:.2f}")
            rows.append(
                {"cost": measured.cost, "size": measured.size, "function": name, "exponent": slope}
                | {"standard_error": error, "sizes": list(measured.sizes), "costs": list(costs)}
            )
    draw_growth(path, growths, title)
    print(f"the figure is {path}")
    return rows


def draw_growth(path: Path, growths: Sequence[Growth], title: str) -> None:
    """Draw a panel per growth on log axes, with the exponents in the legend."""
    columns = 2
    rows = -(-len(growths) // columns)
    with plt.rc_context({"font.size": 9}):
        figure, panels = plt.subplots(rows, columns, figsize=(8, 3 * rows + 0.4), layout="constrained", dpi=200)
        for axes, growth in zip(np.ravel(panels), growths, strict=True):
            for name, costs in growth.costs.items():
                slope, error = exponent(growth.sizes, costs)
                label = f"{name}: exponent {slope:.2f} ± {error:.2f}"
                axes.plot(growth.sizes, costs, marker="o", markersize=3, linewidth=1.2, label=label)
            axes.set(xscale="log", yscale="log", xlabel=growth.size, ylabel=growth.cost)
            tidy(axes)
            axes.set_ylim(top=8 * axes.get_ylim()[1])  # room for the legend
            axes.legend(frameon=False, fontsize=7, loc="upper left")
        figure.suptitle(title)
        figure.savefig(path)
    plt.close(figure)
