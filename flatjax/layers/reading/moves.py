"""Operations that move a kernel's entries, take some of them, or put others beside them."""

from collections.abc import Callable, Mapping
from typing import Any

from jax.extend.core import JaxprEqn

from flatjax.layers.reading.axes import Read, Run, Selection, merged
from flatjax.layers.reading.program import Origins


def sizes_of(value: Any) -> tuple[int, ...]:
    """The shape of a variable of a program."""
    return tuple(value.aval.shape)


def _same(equation: JaxprEqn, operand: int, read: Read, _: Origins) -> list[Read] | None:
    return [read] if operand == 0 else None


def _barrier(equation: JaxprEqn, operand: int, read: Read, _: Origins) -> list[Read] | None:
    return [read] if len(equation.invars) == 1 else None


def _transposed(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read]:
    return [read.transposed(equation.params["permutation"])]


def _reshaped(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read] | None:
    order = equation.params.get("dimensions")
    ordered = read if order is None else read.transposed(order)
    reshaped = ordered.reshaped(sizes_of(equation.outvars[0]))
    return None if reshaped is None else [reshaped]


def _squeezed(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read]:
    return [read.squeezed(equation.params["dimensions"])]


def _broadcast(equation: JaxprEqn, operand: int, read: Read, _: Origins) -> list[Read] | None:
    if operand:
        return None
    return [read.broadcast(sizes_of(equation.outvars[0]), equation.params["broadcast_dimensions"])]


def _reversed(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read]:
    return [read.changed()]


def _padded(equation: JaxprEqn, operand: int, read: Read, _: Origins) -> list[Read] | None:
    return None if operand else [read.resized(sizes_of(equation.outvars[0]))]


def _sliced(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read]:
    sizes = sizes_of(equation.outvars[0])
    for place, start in enumerate(equation.params["start_indices"]):
        read = _part(read, place, sizes[place], int(start), is_looked_up=False)
    return [read.resized(sizes)]


def _sliced_anywhere(equation: JaxprEqn, operand: int, read: Read, origins: Origins) -> list[Read] | None:
    if operand:
        return None
    sizes = sizes_of(equation.outvars[0])
    for place, start in enumerate(equation.invars[1:]):
        read = _part(read, place, sizes[place], start, is_looked_up=origins.is_data(start))
    return [read.resized(sizes)]


def _part(read: Read, place: int, size: int, start: Any, *, is_looked_up: bool) -> Read:
    """Selects one entry of an axis; if the part is longer, the axis stays."""
    first, *others = read.axes[place]
    is_selected = size == 1 < first.size and first.axis is not None and not others
    return read.selecting(place, Selection(start, is_looked_up)) if is_selected else read


def _unstacked(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read]:
    axis = equation.params["axis"]
    return [
        read.selecting(axis, Selection(index, is_looked_up=False)).squeezed([axis])
        for index in range(len(equation.outvars))
    ]


def _split(equation: JaxprEqn, _: int, read: Read, __: Origins) -> list[Read]:
    axis, start, parts = equation.params["axis"], 0, []
    for size, result in zip(equation.params["sizes"], equation.outvars, strict=True):
        parts.append(_part(read, axis, int(size), start, is_looked_up=False).resized(sizes_of(result)))
        start += int(size)
    return parts


def _gathered(equation: JaxprEqn, operand: int, read: Read, _: Origins) -> list[Read] | None:
    """Follows look-ups of whole entries of one axis; other windows are not followed."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if operand or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (axis,) = numbers.start_index_map
    shape = sizes_of(equation.invars[0])
    if sizes[axis] != 1 or any(sizes[place] != shape[place] for place in range(len(shape)) if place != axis):
        return None
    names = read.named([axis])
    index = equation.invars[1]
    looked_up = read.selecting(axis, Selection(index, is_looked_up=True)) if names else read
    if axis in numbers.collapsed_slice_dims:
        looked_up = looked_up.squeezed([axis])
    for place, size in enumerate(sizes_of(equation.outvars[0])):
        if place not in numbers.offset_dims:
            looked_up = looked_up.with_axis(place, (Run(None, size),))
    return [looked_up]


_SAME = (
    "convert_element_type",
    "copy",
    "copy_p",
    "pcast",
    "pvary",
    "reduce_precision",
    "reshard",
    "sharding_constraint",
    "stop_gradient",
)
MOVES: dict[str, Callable[[JaxprEqn, int, Read, Origins], list[Read] | None]] = {
    **dict.fromkeys(
        (
            "convert_element_type",
            "copy",
            "copy_p",
            "sharding_constraint",
            "reshard",
            "pvary",
            "pcast",
            "reduce_precision",
            "stop_gradient",
        ),
        _same,
    ),
    "optimization_barrier": _barrier,
    "transpose": _transposed,
    "reshape": _reshaped,
    "squeeze": _squeezed,
    "broadcast_in_dim": _broadcast,
    "rev": _reversed,
    "pad": _padded,
    "slice": _sliced,
    "dynamic_slice": _sliced_anywhere,
    "unstack": _unstacked,
    "split": _split,
    "gather": _gathered,
}


# Joins: the kernel becomes a part of a larger array, as query, key and value of one product.

JOINS = ("concatenate", "stack", "dynamic_update_slice")


def joined(equation: JaxprEqn, reads: Mapping[int, Read]) -> Read | None:
    """Follows a kernel that becomes a part of a larger array: which axes it keeps.

    Along an axis where others are put beside it, no part can be told from the rest.
    """
    name, sizes = equation.primitive.name, sizes_of(equation.outvars[0])
    if name == "stack":
        axis = equation.params["axis"]
        read = merged(list(reads.values()))
        return None if read is None else read.changed().with_axis(axis, (Run(None, sizes[axis]),))
    if name == "dynamic_update_slice" and not set(reads) <= {0, 1}:
        return None
    resized = [read.changed().resized(sizes) for read in reads.values()]
    return merged(resized)
