"""Keep what is known of the flatness of every layer, to look up, to print and to store."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from flatjax.core import results
from flatjax.curvature.estimate import Estimate


class FlatnessProfile(dict[str, Estimate]):
    """κ of every layer by its name; a stack is found by its path too, κ of its layers in one array.

    Attributes:
        unread: why a kernel could not be read, by its path; its κ is NaN.
    """

    unread: dict[str, str]

    def __init__(self, estimates: Iterable[tuple[str, Estimate]] = (), unread: Mapping[str, str] | None = None):
        super().__init__(estimates)
        self.unread = dict(unread or {})

    def __str__(self) -> str:
        """A table of the layers, and below it why a kernel is not among them."""
        rows = [
            (
                name,
                estimate.value,
                "exact" if estimate.num_probes == 0 else estimate.standard_error,
                estimate.num_probes,
            )
            for name, estimate in self.items()
            if name not in self.unread
        ]
        table = results.table(rows, header=("layer", "κ, larger is sharper", "standard error", "probes"))
        return "\n".join([table, *(f"not measured: {reason}" for reason in self.unread.values())])

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain numbers by layer, ready for JSON; a kernel that could not be read has the reason beside them."""
        return {
            name: estimate.to_dict() | ({"unread": self.unread[name]} if name in self.unread else {})
            for name, estimate in self.items()
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """The layers as a list of mappings, as `pandas.DataFrame` takes them."""
        return [{"layer": name, "unread": None, **numbers} for name, numbers in self.to_dict().items()]

    def __missing__(self, path: str) -> Estimate:
        layers = [estimate for name, estimate in self.items() if name.startswith(f"{path}[")]
        if not layers:
            raise KeyError(path)
        values, errors, _ = zip(*layers, strict=True)
        return Estimate(jnp.stack(values), jnp.stack(errors), layers[0].num_probes)
