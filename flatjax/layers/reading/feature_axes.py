"""Read which axes of a kernel are its features', and which a stack's, as the program uses it, or refuse it by name."""

import jax.numpy as jnp

from flatjax.layers.kernels import Layer, by_convention
from flatjax.layers.reading.axes import Reading
from flatjax.layers.reading.program import Program
from flatjax.layers.reading.uses import Use, uses_of


class MisreadKernelError(ValueError):
    """A kernel's axes are not what they were said to be, or cannot be seen: κ of it would be that of no layer."""


def read_layer(program: Program, layer: str | Layer) -> Layer:
    """Reads the layer as the program uses it; one given with its axes is confirmed.

    Raises:
        MisreadKernelError: the program multiplies the kernel along other axes than those given; or, given only a path,
            it does not show which, or different ones in different places.
    """
    path = layer if isinstance(layer, str) else layer.path
    shape = jnp.shape(program.arguments[program.places[path]])
    uses = uses_of(program, path).telling
    if isinstance(layer, Layer):
        return _confirmed(layer, shape, uses)
    usual = by_convention(path, len(shape))
    unread = next((use for use in uses if not use.readings), None)
    if unread is not None:
        raise MisreadKernelError(
            f"{path!r}, of shape {shape}, is used by {unread.by!r}, where it cannot be seen along which of its axes "
            f"the features run: say so, {_call(path, Reading(usual.feature_axes) if usual else None)} say, and "
            "you are taken at your word"
        )
    every = list(dict.fromkeys(reading for use in uses for reading in use.readings))
    common = [reading for reading in every if all(reading in use.readings for use in uses)]
    for readings in (common, every if path.endswith("embedding") else []):
        agreeing = [reading for reading in readings if usual is not None and _agrees(usual, reading, shape)]
        if agreeing and usual is not None:
            return usual
    if not uses and usual is not None:
        return usual  # whose Hessian is that of a penalty at most
    if common and _may_be_networks(common[0], len(shape)):
        every = [common[0], Reading(common[0].feature_axes, (0,))]
    elif len(common) == 1:
        return Layer(path, *common[0])
    if not every:
        raise MisreadKernelError(f"{path!r}, of shape {shape}, is used in no product: say {_call(path, None)}")
    raise MisreadKernelError(
        f"{path!r}, of shape {shape}, may be read in {len(every)} ways: give one of "
        f"{', '.join(_call(path, reading) for reading in every)}"
    )


def readable_kernels(program: Program) -> list[Layer]:
    """Finds all parameters that the program multiplies with features, whatever they are called."""
    layers: list[Layer] = []
    for path, place in program.places.items():
        kernel = program.arguments[place]
        if jnp.ndim(kernel) < 2 or not jnp.issubdtype(jnp.result_type(kernel), jnp.floating):
            continue
        try:
            layers += [read_layer(program, path)] if uses_of(program, path).telling else []
        except MisreadKernelError:
            continue
    return layers


def _confirmed(layer: Layer, shape: tuple[int, ...], uses: tuple[Use, ...]) -> Layer:
    """Returns the layer as it was given, if some use reads it so, or if no use can be read."""
    readings = list(dict.fromkeys(reading for use in uses for reading in use.readings))
    if not readings or any(_agrees(layer, reading, shape) for reading in readings):
        return layer
    raise MisreadKernelError(
        f"{layer.path!r}, of shape {shape}, is multiplied along its axes {readings[0].feature_axes}"
        f"{f', one layer for each entry of {readings[0].stack_axes}' if readings[0].stack_axes else ''}, but was read "
        f"with the features along {layer.feature_axes}"
        f"{f' and a stack along {layer.stack_axes}' if layer.stack_axes else ''}: give "
        f"{' or '.join(_call(layer.path, reading) for reading in readings)}"
    )


def _agrees(layer: Layer, reading: Reading, shape: tuple[int, ...]) -> bool:
    """Whether a reading is that of a layer, but for axes of one entry.

    Outputs may be taken apart, each a layer of its own.
    """

    def long(axes: tuple[int, ...]) -> set[int]:
        return {axis for axis in axes if shape[axis] > 1}

    features, stack = long(reading.feature_axes), long(reading.stack_axes)
    return features == long(layer.feature_axes) and stack <= long(layer.stack_axes)


def _may_be_networks(reading: Reading, ndim: int) -> bool:
    """Whether the product may be one of several networks on one input.

    A layer whose first outputs' axis comes first looks the same.
    """
    features = reading.feature_axes
    outputs = [axis for axis in range(ndim) if axis not in (*features, *reading.stack_axes)]
    return bool(outputs and features) and outputs[0] < features[0] and outputs[-1] > features[-1]


def as_call(layer: Layer) -> str:
    """Writes a layer as one would in code."""
    stack = f", stack_axes={layer.stack_axes}" if layer.stack_axes else ""
    return f"Layer({layer.path!r}, feature_axes={layer.feature_axes}{stack})"


def _call(path: str, reading: Reading | None) -> str:
    return f"Layer({path!r}, feature_axes=...)" if reading is None else as_call(Layer(path, *reading))
