"""Follow which of a kernel's axes the axes of an array run along that was made of the kernel."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Run(NamedTuple):
    """A stretch of an array's axis, along an axis of the kernel or along none."""

    axis: int | None
    """The kernel's axis; None where entries were repeated or looked up."""
    size: int
    stride: int = 1
    """How many entries of the kernel's axis a step takes: above 1 for the outer part of an axis that was split."""


Axes = tuple[tuple[Run, ...], ...]
"""Each axis of an array as the runs that were joined to it, the outermost first."""


class Selection(NamedTuple):
    """One entry that was taken of a kernel's axis: the kernel of one layer of a stack, or one row of a table."""

    index: Any
    """A number, the variable of a program that holds one or more of them, or None: the step of a loop."""
    is_looked_up: bool
    """Whether the index is an array: another entry may be taken for every sample."""


class Reading(NamedTuple):
    """What a product takes the axes of a kernel for; those that are neither are its outputs'."""

    feature_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()


class Read(NamedTuple):
    """An array made of a kernel, without mixing the entries along those axes that it still has."""

    axes: Axes
    selected: tuple[tuple[int, Selection], ...] = ()
    """The selections, each with the kernel's axis."""
    is_rearranged: bool = True
    """Whether it holds entries of the kernel and nothing else: no number was changed, left out or put between."""
    earlier: tuple[Reading, ...] = ()
    """What products with other parameters, such as those of low-rank factors, have taken it for on the way."""
    with_constant: tuple[Reading, ...] = ()
    """What a product with a constant, which may be data that the loss has closed over, took it for before those."""

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Read":
        """Reads the kernel itself, with all its axes."""
        return cls(tuple((Run(axis, size),) for axis, size in enumerate(shape)))

    def named(self, places: Iterable[int]) -> tuple[int, ...]:
        """The kernel's axes along some axes of the array, in their order."""
        runs = itertools.chain.from_iterable(self.axes[place] for place in places)
        return tuple(dict.fromkeys(run.axis for run in runs if run.axis is not None))

    @property
    def selected_axes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(axis for axis, _ in self.selected))

    @property
    def is_looked_up(self) -> bool:
        return any(selection.is_looked_up for _, selection in self.selected)

    def changed(self) -> "Read":
        return self._replace(is_rearranged=False)

    def transposed(self, permutation: Sequence[int]) -> "Read":
        return self._replace(axes=tuple(self.axes[place] for place in permutation))

    def reshaped(self, shape: Sequence[int]) -> "Read | None":
        """The reshaped array; None where an axis would begin in the middle of another, at no factor of its size."""
        left = list(itertools.chain.from_iterable(self.axes))
        axes: list[tuple[Run, ...]] = []
        for size in shape:
            runs: list[Run] = []
            while left and (_size(runs) < size or (size == 1 and not runs and left[0].size == 1)):
                run = left.pop(0)
                wanted = size // _size(runs)
                if run.size > wanted:
                    if run.size % wanted:
                        return None
                    inner = run.size // wanted
                    left.insert(0, run._replace(size=inner))
                    run = run._replace(size=wanted, stride=run.stride * inner)
                runs.append(run)
            if _size(runs) != size:
                return None
            axes.append(tuple(runs))
        return self._replace(axes=tuple(axes))._without(left)

    def squeezed(self, places: Sequence[int]) -> "Read":
        kept = tuple(axis for place, axis in enumerate(self.axes) if place not in places)
        dropped = itertools.chain.from_iterable(self.axes[place] for place in places)
        return self._replace(axes=kept)._without(dropped)

    def broadcast(self, shape: Sequence[int], places: Sequence[int]) -> "Read":
        """The broadcast array: axis i becomes axis `places[i]` of the result."""
        axes: list[tuple[Run, ...]] = [(Run(None, size),) for size in shape]
        for axis, place in zip(self.axes, places, strict=True):
            if _size(axis) == shape[place]:
                axes[place] = axis
        repeats = math.prod(shape) > math.prod(map(_size, self.axes))
        return self._replace(axes=tuple(axes), is_rearranged=self.is_rearranged and not repeats)

    def resized(self, shape: Sequence[int]) -> "Read":
        """A part of the array, or a larger one that it is a part of: axes stay, but are no longer whole."""
        axes = tuple(
            axis if _size(axis) == size else _resized(axis, size) for axis, size in zip(self.axes, shape, strict=True)
        )
        return self if axes == self.axes else self._replace(axes=axes, is_rearranged=False)

    def selecting(self, place: int, selection: Selection) -> "Read":
        """The array with one entry of an axis taken; the axis stays, with one entry of no axis of the kernel."""
        axes = (*self.axes[:place], (Run(None, 1),), *self.axes[place + 1 :])
        names = self.named([place])
        is_one_axis = len(self.axes[place]) == 1
        return self._replace(
            axes=axes,
            selected=(*self.selected, *((name, selection) for name in names)),
            is_rearranged=self.is_rearranged and is_one_axis,
        )

    def with_axis(self, place: int, axis: tuple[Run, ...]) -> "Read":
        return self._replace(axes=(*self.axes[:place], axis, *self.axes[place:]))

    def _without(self, dropped: Iterable[Run]) -> "Read":
        """Drops axes of one entry, and records that this entry is taken."""
        names = [run.axis for run in dropped if run.axis is not None]
        taken = tuple((name, Selection(0, is_looked_up=False)) for name in names)
        return self._replace(selected=(*self.selected, *taken))


def in_order(runs: Sequence[Run], axes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether runs are the given axes of a kernel, each whole, one after another, as a reshape would join them."""
    whole: list[int] = []
    for axis, group in itertools.groupby((run for run in runs if run.size > 1), key=lambda run: run.axis):
        parts = list(group)
        strides = [math.prod(part.size for part in parts[place + 1 :]) for place in range(len(parts))]
        if axis is None or _size(parts) != shape[axis] or [part.stride for part in parts] != strides:
            return False
        whole.append(axis)
    return whole == [axis for axis in axes if shape[axis] > 1]


def merged(reads: Sequence[Read]) -> Read | None:
    """What arrays of one shape say together, entry by entry; None where they do not agree."""
    axes: list[tuple[Run, ...]] = []
    for runs in zip(*(read.axes for read in reads), strict=True):
        size = max(map(_size, runs))
        known = {run for run in runs if _size(run) == size and any(part.axis is not None for part in run)}
        if len(known) > 1:
            return None
        axes.append(known.pop() if known else (Run(None, size),))
    selected = dict.fromkeys(each for read in reads for each in read.selected)
    earlier = dict.fromkeys(each for read in reads for each in read.earlier)
    with_constant = dict.fromkeys(each for read in reads for each in read.with_constant)
    return Read(tuple(axes), tuple(selected), False, tuple(earlier), tuple(with_constant))


def _size(runs: Sequence[Run]) -> int:
    return math.prod(run.size for run in runs)


def _resized(axis: Sequence[Run], size: int) -> tuple[Run, ...]:
    names = {run.axis for run in axis}
    # Of several axes that were joined, a part is of none of them in particular.
    return (Run(names.pop() if len(names) == 1 else None, size),)
