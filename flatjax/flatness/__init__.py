"""Relative flatness: of a head today; see `flatjax.flatness.relative`."""
