"""All figures have one style: they are drawn to files, with a light grid and no frame at the top and on the right."""

from typing import Literal

import matplotlib
from matplotlib.axes import Axes

matplotlib.use("Agg")

import matplotlib.pyplot as plt

__all__ = ["plt", "tidy"]


def tidy(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Draw a light grid, and leave out the frame at the top and on the right."""
    axes.grid(axis=grid, alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
