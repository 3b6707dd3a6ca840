"""Read from the types of arrays how they are sharded."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

T = TypeVar("T")


def explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh with explicit axes, if an array of `tree` lies on one."""
    return next((mesh for mesh in _meshes(tree) if mesh.explicit_axes), None)


def num_devices(tree: Any) -> int:
    """How many devices the compiler splits the work on `tree` among.

    They are those of the arrays' mesh, or else of the mesh that is set.
    """
    mesh = next((mesh for mesh in _meshes(tree) if not mesh.empty), jax.sharding.get_abstract_mesh())
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, axis_type in sizes if axis_type == AxisType.Auto)


def varying_axes(tree: Any) -> frozenset[str]:
    """The axes of a `jax.shard_map` along which an array of `tree` may differ from device to device."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def varying_along(tree: T, names: Iterable[str]) -> T:
    """Says that `tree` varies along axes of a `jax.shard_map`; other axes have no such types."""
    manual = set(names) & set(jax.sharding.get_abstract_mesh().manual_axes)

    def cast(leaf: Array) -> Array:
        missing = tuple(sorted(manual - varying_axes(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def axis_names(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Reads one axis name, several, or none as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def varying_like(tree: T, like: Any) -> T:
    """Says that `tree` varies along the axes that `like` varies along: a loop that mixes them must start so."""
    return varying_along(tree, varying_axes(like))


def automatic(function: Callable[..., T], like: T) -> Callable[..., T]:
    """Lets the compiler choose the shardings inside `function` on a mesh with explicit axes.

    The result is sharded as `like` is.
    """

    def wrapped(*args: Any) -> T:
        mesh = explicit_mesh((args, like))
        if mesh is None:
            return function(*args)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, like)
        with jax.sharding.use_abstract_mesh(mesh):
            automatic: Callable[..., T] = jax.sharding.auto_axes(function, out_sharding=shardings)  # pyrefly: ignore
            return automatic(*args)

    return wrapped


def gathered(value: Array) -> Array:
    """Puts the whole array on every device, where the mesh has explicit axes and an operation would ask for that."""
    return value if explicit_mesh(value) is None else jax.sharding.reshard(value, PartitionSpec())


def placed_like(value: Array, like: Any) -> Array:
    """Shards an array as `like` is, where the mesh has explicit axes and two of a kind must be sharded alike."""
    sharding = jax.typeof(like).sharding
    return value if explicit_mesh(like) is None else jax.sharding.reshard(value, sharding)


def sum_over_devices(value: Array, axis_names: tuple[str, ...]) -> Array:
    """The sum along axes of a `jax.shard_map`, if there are any."""
    return jax.lax.psum(value, axis_names) if axis_names else value


def _meshes(tree: Any) -> Iterator[AbstractMesh]:
    return (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
