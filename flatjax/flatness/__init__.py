"""Relative flatness of a linear head and its variants; see `flatjax.flatness.relative`."""
