"""What a layer is: a kernel of any shape, seen as the matrix that features are multiplied with."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.curvature.leaves import Tree, leaves_by_path


class Layer(NamedTuple):
    """A kernel, and which of its axes the features run along; the others are those of the outputs."""

    path: str
    """Of the leaf, its keys joined by slashes."""
    feature_axes: tuple[int, ...]

    def matrix(self, kernel: Float[Array, "..."]) -> Float[Array, "m d"]:
        """Wᵀ: one row a feature, one column an output."""
        return jnp.transpose(kernel, self._order(kernel.ndim)).reshape(self.num_features(kernel.shape), -1)

    def kernel(self, matrix: Float[Array, "m d"], shape: tuple[int, ...]) -> Float[Array, "..."]:
        """The kernel whose matrix it is."""
        order = self._order(len(shape))
        permuted = matrix.reshape([shape[axis] for axis in order])
        return jnp.transpose(permuted, [order.index(axis) for axis in range(len(shape))])

    def num_features(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in self.feature_axes)

    def _order(self, ndim: int) -> tuple[int, ...]:
        return (*self.feature_axes, *(axis for axis in range(ndim) if axis not in self.feature_axes))


def find_layer(params: Tree, layer: str | Layer) -> tuple[Layer, jax.Array]:
    """The layer at a path, its features' axes by Flax's conventions, and its kernel.

    Raises:
        TypeError: the kernel is not of a floating dtype.
        ValueError: there is no leaf at the path, or it is no kernel, or the axes given do not fit it.
    """
    leaves = leaves_by_path(params)
    path = layer if isinstance(layer, str) else layer.path
    if path not in leaves:
        raise ValueError(
            f"params has no leaf at {path!r}; its layers are {_named(find_layers(params))}, its leaves "
            f"{', '.join(map(repr, leaves))}"
        )
    kernel = leaves[path]
    found = _by_convention(path, jnp.ndim(kernel)) if isinstance(layer, str) else layer
    if found is None:
        raise ValueError(
            f"{path!r}, of shape {jnp.shape(kernel)}, is no layer: a bias or the scale of a normalisation has no rows; "
            f"for a kernel of another name give Layer({path!r}, feature_axes=...). Layers here: "
            f"{_named(find_layers(params))}"
        )
    axes = found.feature_axes
    if not 0 < len(set(axes)) == len(axes) or not all(0 <= axis < jnp.ndim(kernel) for axis in axes):
        raise ValueError(
            f"feature_axes is {axes} for {path!r} of shape {jnp.shape(kernel)}, wanted different axes from 0 to "
            f"{jnp.ndim(kernel) - 1}"
        )
    if not jnp.issubdtype(jnp.result_type(kernel), jnp.floating):
        raise TypeError(f"{path!r} has dtype {jnp.result_type(kernel)}, wanted a floating dtype")
    return found, kernel


def find_layers(params: Tree) -> dict[str, Layer]:
    """All leaves that are a layer by Flax's conventions, in their order in the tree."""
    found = (_by_convention(path, jnp.ndim(leaf)) for path, leaf in leaves_by_path(params).items())
    return {layer.path: layer for layer in found if layer is not None}


def _by_convention(path: str, ndim: int) -> Layer | None:
    """A kernel's last axis is its outputs', but that the projections of attention have two such axes.

    An embedding is looked up: its features are one-hot, and run along its first axis.
    """
    *parents, name = path.split("/")
    if name == "embedding" and ndim == 2:
        return Layer(path, (0,))
    if name != "kernel" or ndim < 2:
        return None
    projects = ndim == 3 and parents and parents[-1] in ("query", "key", "value")
    return Layer(path, (0,) if projects else tuple(range(ndim - 1)))


def _named(layers: Mapping[str, Layer]) -> str:
    return ", ".join(map(repr, layers)) or "none"
