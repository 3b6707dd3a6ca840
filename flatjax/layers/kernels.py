"""Layers: kernels of any shape, each seen as the matrix, or matrices, that features are multiplied with."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flatjax.core.trees import Tree, arrays_by_path


class Layer(NamedTuple):
    """A kernel, and which of its axes the features run along; the others are those of the outputs, or of a stack.

    A stack holds the kernels of several layers in one array, as `nn.scan`, `nnx.scan` and `jax.vmap` keep them: its
    layers are the slices along `stack_axes`. `Layer("blocks/kernel", feature_axes=(1,), stack_axes=(0,))` are the L
    layers of a kernel (L, m, d).
    """

    path: str
    """The path of the leaf: its keys joined by slashes."""
    feature_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()

    def output_axes(self, ndim: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(ndim) if axis not in (*self.stack_axes, *self.feature_axes))

    def num_features(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in self.feature_axes)

    def stack_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of κ: that of a stack, and () for a single layer."""
        return tuple(shape[axis] for axis in self.stack_axes)

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The names of the layers, "blocks/kernel[3]" in a stack."""
        places = itertools.product(*map(range, self.stack_shape(shape)))
        return [f"{self.path}[{','.join(map(str, place))}]" if place else self.path for place in places]

    def matrices(self, kernel: Float[Array, "..."]) -> Float[Array, "l m d"]:
        """The matrix Wᵀ of each layer: one row a feature, one column an output."""
        shape = math.prod(self.stack_shape(kernel.shape)), self.num_features(kernel.shape), -1
        return jnp.transpose(kernel, self._order(kernel.ndim)).reshape(shape)

    def matrix(self, kernel: Float[Array, "..."], index: Integer[Array, ""] | int = 0) -> Float[Array, "m d"]:
        """The matrix Wᵀ of one layer."""
        return self.matrices(kernel)[index]

    def kernel(self, matrices: Float[Array, "l m d"], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """The kernel whose matrices Wᵀ are the given ones."""
        order = self._order(len(shape))
        permuted = matrices.reshape([shape[axis] for axis in order])
        return jnp.transpose(permuted, [order.index(axis) for axis in range(len(shape))])

    def _order(self, ndim: int) -> tuple[int, ...]:
        return (*self.stack_axes, *self.feature_axes, *self.output_axes(ndim))


def find_kernel(params: Tree, layer: str | Layer) -> jax.Array:
    """Finds the leaf that a layer names.

    Raises:
        TypeError: it is not of a floating dtype, or axes are no tuples of integers.
        ValueError: there is no leaf at the path, it has too few axes, or the axes given do not fit it.
    """
    leaves = arrays_by_path(params)
    path = layer if isinstance(layer, str) else layer.path
    if path not in leaves:
        raise ValueError(
            f"params has no leaf at {path!r}; its layers are {_named(find_layers(params))}, its leaves "
            f"{', '.join(map(repr, leaves))}"
        )
    kernel = leaves[path]
    ndim = jnp.ndim(kernel)
    if isinstance(layer, str) and ndim < 2:
        raise ValueError(
            f"{path!r}, of shape {jnp.shape(kernel)}, is no layer: a bias or the scale of a normalisation has no rows; "
            f"layers here are {_named(find_layers(params))}"
        )
    if isinstance(layer, Layer):
        _check_axes(layer, jnp.shape(kernel))
    if not jnp.issubdtype(jnp.result_type(kernel), jnp.floating):
        raise TypeError(f"{path!r} has dtype {jnp.result_type(kernel)}, wanted a floating dtype")
    return kernel


def paths_of(params: Tree, layers: Sequence[str | Layer]) -> list[str]:
    """Finds the paths of layers that are named together, each of which has to be there.

    Raises:
        TypeError: as `find_kernel`.
        ValueError: two name one leaf; and as `find_kernel`.
    """
    for layer in layers:
        find_kernel(params, layer)
    paths = [layer if isinstance(layer, str) else layer.path for layer in layers]
    if len(set(paths)) < len(paths):
        raise ValueError("layers names a leaf twice, wanted one reading of each at a time")
    return paths


def find_layers(params: Tree) -> dict[str, Layer]:
    """Finds all leaves that are a layer by Flax's conventions, in their order in the tree."""
    found = (by_convention(path, jnp.ndim(leaf)) for path, leaf in arrays_by_path(params).items())
    return {layer.path: layer for layer in found if layer is not None}


def by_convention(path: str, ndim: int) -> Layer | None:
    """Reads a leaf as a layer by Flax's conventions, or returns None if it is none.

    A kernel's last axis is its outputs', but the projections of attention have two such axes. An embedding is looked
    up: its features are one-hot, and run along its first axis.
    """
    *parents, name = path.split("/")
    if name == "embedding" and ndim == 2:
        return Layer(path, (0,))
    if name != "kernel" or ndim < 2:
        return None
    projects = ndim == 3 and parents and parents[-1] in ("query", "key", "value")
    return Layer(path, (0,) if projects else tuple(range(ndim - 1)))


def _check_axes(layer: Layer, shape: tuple[int, ...]) -> None:
    for name, axes in (("feature_axes", layer.feature_axes), ("stack_axes", layer.stack_axes)):
        if not isinstance(axes, tuple) or not all(isinstance(axis, int) for axis in axes):
            fix = f"({axes},)" if isinstance(axes, int) else "a tuple of integers"
            raise TypeError(f"{name} is {axes!r} for {layer.path!r}, wanted {name}={fix}")
    axes = (*layer.feature_axes, *layer.stack_axes)
    if not layer.feature_axes or len(set(axes)) < len(axes) or not all(0 <= axis < len(shape) for axis in axes):
        raise ValueError(
            f"feature_axes is {layer.feature_axes} and stack_axes {layer.stack_axes} for {layer.path!r} of shape "
            f"{shape}, wanted different axes from 0 to {len(shape) - 1}, of features one at least"
        )


def _named(layers: Mapping[str, Layer]) -> str:
    return ", ".join(map(repr, layers)) or "none"
