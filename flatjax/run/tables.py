"""Format tables of text."""

import unicodedata
from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Format a line per row, with the first column to the left and the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for name, *others in cells:
        left = name + " " * (widths[0] - _width(name))
        right = [" " * (width - _width(cell)) + cell for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([left, *right]))
    return "\n".join(lines)


def _width(text: str) -> int:
    """Return the width of a text; the hat of κ̂ takes no place of its own."""
    return sum(not unicodedata.combining(letter) for letter in text)
