"""Results as a small table to print, and as plain numbers to keep.

A result stays the tuple of arrays that it is; its class takes both of these as methods:

    class Spread(NamedTuple):
        mean: Array
        to_dict = results.to_dict
        __str__ = results.to_table
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

MOST_SHOWN = 6
"""How many numbers of an array a table shows; a larger array is shown by its extremes."""


def to_dict(result: Any) -> dict[str, Any]:
    """The numbers of a result by their names, ready for strict JSON: floats, integers, booleans and lists of them.

    JSON has no NaN and no infinity. None stands for NaN, and "inf" or "-inf" for an infinity; `float` makes numbers of
    these two again.

    Raises:
        TypeError: inside `jax.jit`, where there are no numbers yet.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import logit_sharpness
        >>> sharpness = logit_sharpness(jnp.array([[2.0, 0.0]], jnp.float32), jnp.array([0]), radius=0.0)
        >>> {name: value and round(value, 4) for name, value in sharpness.to_dict().items()}
        {'rise': 0.0, 'loss': 0.1269, 'relative': 0.0}
    """
    return {name: plain(value) for name, value in _named(result).items()}


def to_table(result: Any) -> str:
    """Shows a result as lines of names and numbers; inside `jax.jit`, which has no numbers yet, of names and shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import logit_sharpness
        >>> print(logit_sharpness(jnp.zeros((1, 2), jnp.float32), jnp.array([0]), radius=0.0))
        rise      0
        loss      0.693147
        relative  0
    """
    return table([(name, shown(value)) for name, value in _named(result).items()])


def table(rows: Sequence[Sequence[Any]], header: Sequence[str] | None = None) -> str:
    """Lays rows of cells below each other, each column as wide as its widest cell.

    Example:
        >>> print(table([("head/kernel", 0.5), ("blocks/0/up/kernel", -12.25)], header=("layer", "value")))
        layer               value
        head/kernel         0.5
        blocks/0/up/kernel  -12.25
    """
    cells = [[cell if isinstance(cell, str) else shown(cell) for cell in row] for row in rows]
    cells = [list(header), *cells] if header else cells
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def shown(value: Any) -> str:
    """Shows a number, or a tree of them, in one line of a table."""
    if value is None:
        return "none"
    if not _is_number(value):
        nested = _named(value)
        return ", ".join(f"{name} {shown(part)}" for name, part in nested.items())
    if not _is_known(value):
        return str(jax.typeof(value))
    numbers = np.asarray(value)
    if numbers.ndim == 0:
        return _shown(numbers[()])
    if numbers.size <= MOST_SHOWN and numbers.ndim == 1:
        return f"[{' '.join(_shown(number) for number in numbers)}]"
    shape = "×".join(map(str, numbers.shape))
    if not numbers.size:
        return f"{shape} numbers"
    return f"{shape} numbers, {_shown(np.min(numbers))} to {_shown(np.max(numbers))}"


def plain(value: Any) -> Any:
    """Turns a number into Python's, an array into lists, any other tree into a mapping, by the rules of `to_dict`."""
    if value is None or isinstance(value, str):
        return value
    if not _is_number(value):
        return {name: plain(part) for name, part in _named(value).items()}
    if not _is_known(value):
        raise TypeError(
            f"a result holds {jax.typeof(value)}, no number yet or not all here: export it outside of jax.jit"
        )
    return _for_json(np.asarray(value).tolist())


def _named(result: Any) -> dict[str, Any]:
    """Collects the fields of a tuple and the properties of its class, or the parts of another tree by their paths."""
    if isinstance(result, Mapping):
        return {str(name): value for name, value in result.items()}
    if not hasattr(result, "_asdict"):
        leaves = jax.tree_util.tree_leaves_with_path(result)
        return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    derived = [name for name, value in vars(type(result)).items() if isinstance(value, property)]
    return result._asdict() | {name: getattr(result, name) for name in derived}


def _is_number(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray | np.generic | bool | int | float)


def _is_known(value: Any) -> bool:
    """Whether the value has numbers here: a traced one has none, and one shared with another process not all."""
    is_traced = isinstance(value, jax.core.Tracer)
    return not is_traced and (not isinstance(value, jax.Array) or value.is_fully_addressable)


def _shown(number: Any) -> str:
    is_whole = np.asarray(number).dtype.kind in "iub"
    return str(number) if is_whole else f"{float(number):.6g}"


def _for_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_for_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
