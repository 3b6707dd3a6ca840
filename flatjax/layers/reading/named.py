"""Read several layers at once: those that are named, or all that are found by their names."""

from collections.abc import Sequence

from flatjax.core.trees import Tree
from flatjax.layers.kernels import Layer, find_layers, paths_of
from flatjax.layers.reading.feature_axes import MisreadKernelError, as_call, read_layer, readable_kernels
from flatjax.layers.reading.program import Program


def named_layers(program: Program, params: Tree, layers: Sequence[str | Layer] | None) -> list[str | Layer]:
    """The layers as they are named, or the paths of all that are found by their names.

    Raises:
        TypeError: a kernel is not of a floating dtype.
        ValueError: there are none, one is named twice or does not exist, or one is given that is no list.
    """
    check_list(layers)
    named: list[str | Layer] = [*find_layers(params)] if layers is None else [*layers]
    if not named:
        given = ", ".join(map(as_call, readable_kernels(program))) or "Layer(path, feature_axes=...)"
        raise ValueError(
            "params has no layers that are found by their names: none of its leaves is called 'kernel' or "
            f"'embedding'. Give layers=[{given}], with flatjax.Layer"
        )
    paths_of(params, named)
    return named


def check_list(layers: Sequence[str | Layer] | None) -> None:
    """Raises a ValueError where one layer is given in the place of several, or none in a list."""
    if isinstance(layers, str | Layer):
        raise ValueError(f"layers is {layers!r}, wanted several, as [{layers!r}]")
    if layers is not None and not layers:
        raise ValueError("layers is empty, wanted at least one, as ['hidden/kernel']")


def read_layers(program: Program, named: Sequence[str | Layer]) -> tuple[list[Layer], dict[str, str]]:
    """Reads layers as the program uses them, and says by path why others cannot be read.

    Raises:
        ValueError: none can be read.
    """
    layers, unread = [], dict[str, str]()
    for layer in named:
        try:
            layers.append(read_layer(program, layer))
        except MisreadKernelError as error:
            unread[layer if isinstance(layer, str) else layer.path] = str(error)
    if not layers:
        raise ValueError("no kernel of params can be read:\n" + "\n".join(unread.values()))
    return layers, unread
