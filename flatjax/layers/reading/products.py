"""One product of features with the kernel of a layer, or with those of a stack."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Bool, Float, Integer

from flatjax.layers.kernels import Layer
from flatjax.layers.reading.axes import Read, Run, Selection, in_order
from flatjax.layers.reading.moves import sizes_of
from flatjax.layers.reading.uses import Use


class NotOneProductError(ValueError):
    """A kernel is used otherwise than in one product of matrices with the features."""


_ROLES = ("stack", "row", "output")


class _Place(NamedTuple):
    """An axis of the result of a product: that of a stack, of the feature vectors or of the outputs."""

    role: str
    number: int
    """Its number among those of its kind."""
    size: int


class LayerProduct(NamedTuple):
    """The layout of the result of a product."""

    equation: JaxprEqn
    operand: int
    layer: Layer
    shape: tuple[int, ...]
    read: Read
    features: tuple[int, ...]
    """The axes of the features that are summed over, in the order of the kernel's."""
    places: tuple[_Place, ...]
    """The places that the axes of the result take."""
    row_axes: tuple[int, ...]
    """The axes of the other operand that hold the feature vectors."""
    stack_axes: Mapping[int, int]
    """The axis of the other operand by the kernel's, where both have one for a stack."""

    @property
    def rows(self) -> tuple[int, ...]:
        other = sizes_of(self.equation.invars[1 - self.operand])
        return tuple(other[axis] for axis in self.row_axes)

    def fixed_index(self, axis: int) -> int | None:
        """The one entry of an axis of a stack that the product is with, where it is known; else None."""
        selection = self._selection(axis)
        return selection.index if selection is not None and isinstance(selection.index, int) else None

    def is_stepped(self, axis: int, stacks: Collection[Var]) -> bool:
        """Whether an entry of an axis is what a loop takes of a stack, another at each step."""
        selection = self._selection(axis)
        return selection is not None and isinstance(selection.index, Var) and selection.index in stacks

    @property
    def wanted(self) -> list[Var]:
        """The variables that say which entries are taken."""
        indices = [selection.index for _, selection in self.read.selected]
        return [index for index in indices if isinstance(index, Var)]

    def shifted(
        self,
        operands: Sequence[Any],
        known: Mapping[Var, Any],
        shift: Float[Array, "n d"],
        index: Integer[Array, ""] | int,
    ) -> tuple[Array, Float[Array, "n m"]]:
        """The result with the outputs of one layer shifted, and that layer's features."""
        result = self.equation.primitive.bind(*operands, **self.equation.params)
        stack = self.layer.stack_shape(self.shape)
        entries = dict(zip(self.layer.stack_axes, jnp.unravel_index(index, stack) if stack else (), strict=True))
        is_of_layer = self._is_of_layer(operands, known, entries)
        feats = jnp.transpose(operands[1 - self.operand], (*self.stack_axes.values(), *self.row_axes, *self.features))
        for axis in self.stack_axes:
            feats = jax.lax.dynamic_index_in_dim(feats, entries[axis], keepdims=False)
        feats = feats.reshape(math.prod(self.rows), -1)
        if is_of_layer is not None:
            feats = jnp.where(is_of_layer.reshape(-1, 1), feats, 0)
            shift = jnp.where(is_of_layer.reshape(-1, 1), shift, 0)
        return result + self._laid_out(shift, entries).astype(result.dtype), feats

    def _is_of_layer(
        self, operands: Sequence[Any], known: Mapping[Var, Any], entries: Mapping[int, Any]
    ) -> Bool[Array, "..."] | None:
        """Marks the feature vectors that meet the layer that is asked for; None where all do."""
        masks = []
        for axis, entry in entries.items():
            if self.equation.primitive.name == "ragged_dot_general":
                ends = jnp.cumsum(operands[2])
                taken = jnp.searchsorted(ends, jnp.arange(self.rows[0], dtype=ends.dtype), side="right")
                masks.append(taken == jnp.asarray(entry, taken.dtype))
                continue
            selection = self._selection(axis)
            if selection is None:
                continue
            taken = selection.index
            if isinstance(taken, Literal):
                taken = taken.val
            elif isinstance(taken, Var):
                taken = known[taken]
            taken = jnp.asarray(taken)
            mask = taken == jnp.asarray(entry, taken.dtype)
            if selection.is_looked_up and mask.ndim:
                mask = mask.reshape(*mask.shape[:-1], *[1] * (len(self.rows) - mask.ndim + 1))
            masks.append(jnp.broadcast_to(mask, self.rows))
        return None if not masks else jnp.all(jnp.stack(masks), axis=0)

    def _laid_out(self, shift: Float[Array, "n d"], entries: Mapping[int, Any]) -> Array:
        """Lays a shift of a layer's outputs out as one of the result."""
        by_role = sorted(self.places, key=lambda place: (_ROLES.index(place.role), place.number))
        stacked = [place for place in by_role if place.role == "stack"]
        rest = shift.reshape([place.size for place in by_role[len(stacked) :]])
        is_entry = jnp.ones((), bool)
        for place in stacked:
            is_entry = is_entry[..., None] & (jnp.arange(place.size) == entries[place.number])
        rest = jnp.where(is_entry.reshape(*is_entry.shape, *[1] * rest.ndim), rest, 0) if stacked else rest
        return jnp.transpose(rest, [by_role.index(place) for place in self.places])

    def _selection(self, axis: int) -> Selection | None:
        return dict(self.read.selected).get(axis)


def layer_product(use: Use, layer: Layer, shape: tuple[int, ...]) -> LayerProduct:
    """Reads a use of a kernel as a product.

    Raises:
        NotOneProductError: it is none, or not with the kernel as it is.
    """
    equation, read, path = use.equation, use.read, layer.path
    name = equation.primitive.name
    if name not in ("dot_general", "ragged_dot_general") or not isinstance(read, Read):
        raise NotOneProductError(f"{path!r} is used by {name!r}, wanted a product of matrices")
    if not read.is_rearranged or read.earlier or (name == "ragged_dot_general" and use.operand != 1):
        raise NotOneProductError(f"{path!r} is changed before it is used by {name!r}, wanted the kernel as it is")
    grouped: tuple[int, ...] = ()
    if name == "dot_general":
        contracted, batched = equation.params["dimension_numbers"]
    else:
        numbers = equation.params["ragged_dot_dimension_numbers"]
        contracted, batched = numbers.dot_dimension_numbers
        grouped = tuple(numbers.rhs_group_dimensions)
    operand, other = use.operand, 1 - use.operand
    pairs = sorted(
        zip(contracted[operand], contracted[other], strict=True),
        key=lambda pair: [(run.axis or 0, -run.stride) for run in read.axes[pair[0]]],
    )
    other_shape = sizes_of(equation.invars[other])
    stack_axes: dict[int, int] = {}
    row_batch: list[int] = []
    places: list[_Place] = []
    for mine, its in zip(batched[operand], batched[other], strict=True):
        named = read.named([mine])
        if not named:
            places.append(_Place("row", len(row_batch), other_shape[its]))
            row_batch.append(its)
        elif len(named) == 1 and named[0] in layer.stack_axes and in_order(read.axes[mine], named, shape):
            places.append(_Place("stack", named[0], shape[named[0]]))
            stack_axes[named[0]] = its
        else:
            raise NotOneProductError(f"{path!r} is multiplied in parts, one an entry of a batch")
    rows = [axis for axis in range(len(other_shape)) if axis not in (*contracted[other], *batched[other])]
    of_rows = [_Place("row", len(row_batch) + i, other_shape[axis]) for i, axis in enumerate(rows)]
    of_kernel: list[_Place] = []
    outputs: list[Run] = []
    for mine, axis in enumerate(read.axes):
        if mine in (*contracted[operand], *batched[operand], *grouped):
            continue
        named = read.named([mine])
        if len(named) == 1 and named[0] in layer.stack_axes and in_order(axis, named, shape):
            of_kernel.append(_Place("stack", named[0], shape[named[0]]))
        else:
            of_kernel.append(_Place("output", len(of_kernel), math.prod(run.size for run in axis)))
            outputs.extend(axis)
    summed = [run for mine, _ in pairs for run in read.axes[mine]]
    is_as_read = in_order(summed, layer.feature_axes, shape) and in_order(outputs, layer.output_axes(len(shape)), shape)
    if not is_as_read:
        raise NotOneProductError(f"{path!r} has its axes in another order where it is used by {name!r}")
    places += [*of_kernel, *of_rows] if operand == 0 else [*of_rows, *of_kernel]
    features = tuple(its for _, its in pairs)
    return LayerProduct(equation, operand, layer, shape, read, features, tuple(places), (*row_batch, *rows), stack_axes)
