"""What every public metric does around its formula."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.sharding import PartitionSpec

from flatjax.sharding import explicit_mesh

F = TypeVar("F", bound=Callable[..., Any])


def metric(function: F) -> F:
    """Runs a metric of arrays at full precision, on arrays however they are sharded.

    Its products of float32 are of float32, which on a GPU or a TPU is not the default, as its sums cancel. On a mesh
    with explicit axes the compiler chooses the shardings inside the metric, and the result is replicated.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        arrays = {name: value for name, value in kwargs.items() if _holds_arrays_alone(value)}
        options = {name: value for name, value in kwargs.items() if name not in arrays}

        def compute(args: tuple[Any, ...], arrays: dict[str, Any]) -> Any:
            return function(*args, **arrays, **options)

        with jax.default_matmul_precision("highest"):
            mesh = explicit_mesh((args, arrays))
            if mesh is None:
                return compute(args, arrays)
            with jax.sharding.use_abstract_mesh(mesh):
                automatic = jax.sharding.auto_axes(compute, out_sharding=PartitionSpec())
                return cast(Callable[..., Any], automatic)(args, arrays)

    return cast(F, wrapped)


def compiled_metric(function: F) -> F:
    """A `metric` whose keywords-only are static, compiled once for each of them and for each shape."""
    parameters = inspect.signature(function).parameters.values()
    static = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    compiled = jax.jit(metric(function), static_argnames=static)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    return cast(F, wrapped)


def _holds_arrays_alone(value: Any) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in leaves)
