"""Keep what is known of the flatness of every layer, to look up, to print and to store."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flatjax.core import results
from flatjax.curvature.estimate import Estimate


class GaussNewtonFlatness(NamedTuple):
    """κ^GN of one layer, or of the layers of a stack, with both of its errors."""

    value: Float[Array, "..."]
    """κ^GN, in the unit of the loss; at least 0, larger is sharper."""
    standard_error: Float[Array, "..."]
    """The standard error of the draws, given the data."""
    data_error: Float[Array, "..."]
    """The standard error over batches, were others drawn; that of the draws is in it. NaN for a single batch."""
    simplified: Float[Array, "..."]
    """κ̂^GN = ‖W‖² Tr GN, which no rotation of weights changes."""
    trace: Float[Array, "..."]
    """The trace of the Gauss-Newton matrix of the layer."""
    num_draws: Integer[Array, ""]
    """The number of random draws, over all batches."""

    to_dict = results.to_dict
    __str__ = results.to_table


E = TypeVar("E", Estimate, GaussNewtonFlatness)


class _ByLayer(dict[str, E]):
    """What is known of every layer by its name; a stack is found by its path too, its layers in one array."""

    unread: dict[str, str]

    def __init__(self, estimates: Iterable[tuple[str, E]] = (), unread: Mapping[str, str] | None = None):
        super().__init__(estimates)
        self.unread = dict(unread or {})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain numbers by layer, ready for JSON; a kernel that could not be read has the reason beside them."""
        return {
            name: estimate.to_dict() | ({"unread": self.unread[name]} if name in self.unread else {})
            for name, estimate in self.items()
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """The layers as a list of mappings, as `pandas.DataFrame` takes them."""
        return [{"layer": name, "unread": None, **numbers} for name, numbers in self.to_dict().items()]

    def __missing__(self, path: str) -> E:
        layers = [estimate for name, estimate in self.items() if name.startswith(f"{path}[")]
        if not layers:
            raise KeyError(path)
        *numbers, count = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        return type(layers[0])(*numbers, count[0])

    def _table(self, rows: list[tuple[Any, ...]], header: tuple[str, ...]) -> str:
        """A table of the layers, and below it why a kernel is not among them."""
        measured = [row for row in rows if row[0] not in self.unread]
        reasons = (f"not measured: {reason}" for reason in self.unread.values())
        return "\n".join([results.table(measured, header=header), *reasons])


class FlatnessProfile(_ByLayer[Estimate]):
    """κ of every layer by its name; a stack is found by its path too, κ of its layers in one array.

    Attributes:
        unread: why a kernel could not be read, by its path; its κ is NaN.
    """

    def __str__(self) -> str:
        """A table of the layers, and below it why a kernel is not among them."""
        rows = [
            (name, value, "exact" if num_probes == 0 else error, num_probes)
            for name, (value, error, num_probes) in self.items()
        ]
        return self._table(rows, ("layer", "κ, larger is sharper", "standard error", "probes"))


class GaussNewtonProfile(_ByLayer[GaussNewtonFlatness]):
    """κ^GN of every layer by its name; a stack is found by its path too, κ^GN of its layers in one array.

    Attributes:
        unread: why a kernel could not be read, by its path; its κ^GN is NaN.
    """

    def __str__(self) -> str:
        """A table of the layers, and below it why a kernel is not among them."""
        header = ("layer", "κ^GN, larger is sharper", "error of draws", "over batches", "κ̂^GN", "Tr GN", "draws")
        return self._table([(name, *numbers) for name, numbers in self.items()], header)
