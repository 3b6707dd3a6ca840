"""Wrap every public metric in what is the same around all formulas."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, overload

import jax
import numpy as np
from jax.sharding import PartitionSpec

from flatjax.core.arrays import as_arrays
from flatjax.core.sharding import explicit_mesh
from flatjax.heads import head_arrays

F = TypeVar("F", bound=Callable[..., Any])
Placement = Literal["replicated", "as the first", "as it comes"]


@overload
def metric(function: F, /) -> F: ...
@overload
def metric(*, compiled: bool = True, placed: Placement = "replicated") -> Callable[[F], F]: ...
def metric(function: Any = None, /, *, compiled: bool = True, placed: Placement = "replicated") -> Any:
    """Compiles a metric, once for each shape and each value of its keyword-only arguments, which are static.

    All other arguments are arrays and trees of them, however they are sharded. From the second call on with the same
    shapes nothing compiles, inside `jax.jit` or out of it. What is no array of JAX is read first, by `as_arrays`. An
    argument called `params` is a head in any of its layouts, and `labels` and `partners` are classes.

    Products of float32 are computed in float32, as the sums of metrics cancel; on a GPU or a TPU that is not the
    default. On a mesh with explicit axes the compiler chooses the shardings inside the metric.

    Args:
        function: the metric.
        compiled: False for what has to raise errors that depend on values.
        placed: how the result is sharded on a mesh with explicit axes: "replicated"; "as the first", where the result
            is a newer version of the first argument; or "as it comes", where nothing inside has to be chosen.
    """
    if function is None:
        return functools.partial(metric, compiled=compiled, placed=placed)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def on_any_mesh(*values: Any, **options: Any) -> Any:
        mesh = None if placed == "as it comes" else explicit_mesh(values)
        if mesh is None:
            return function(*values, **options)
        is_newer = placed == "as the first"
        like = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, values[0]) if is_newer else PartitionSpec()
        with jax.sharding.use_abstract_mesh(mesh):
            automatic = jax.sharding.auto_axes(functools.partial(function, **options), out_sharding=like)
            return cast(Callable[..., Any], automatic)(*values)

    static = [name for name, parameter in signature.parameters.items() if parameter.kind == parameter.KEYWORD_ONLY]
    compute = jax.jit(on_any_mesh, static_argnames=static) if compiled else on_any_mesh

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        values = {name: _READERS.get(name, as_arrays)(name, arguments.arguments[name]) for name in ordinary}
        options = {name: _static(name, arguments.arguments[name]) for name in static}
        # Around the call too: the derivatives of a compiled function are made outside of it.
        with jax.default_matmul_precision("highest"):
            return compute(*values.values(), **options)

    ordinary = [name for name in signature.parameters if name not in static]
    return wrapped


def _head(name: str, params: Any) -> dict[str, Any] | None:
    return None if params is None else as_arrays(name, head_arrays(params))


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "params": _head,
    "labels": functools.partial(as_arrays, are_classes=True),
    "partners": functools.partial(as_arrays, are_classes=True),
}


def _static(name: str, value: Any) -> Any:
    """Reads an option that programs are told apart by.

    Raises:
        TypeError: the option is an array, or has no hash.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list):
        return _static(name, tuple(value))
    if isinstance(value, jax.Array | np.ndarray):
        got = "a traced value" if isinstance(value, jax.core.Tracer) else f"an array of shape {value.shape}"
        raise TypeError(
            f"{name} is {got}, wanted a plain one, as it is static: {name}=x.item(), and inside a jax.jit of your own "
            f"a value that is known when it is traced, static_argnames={name!r}"
        )
    try:
        hash(value)
    except TypeError as error:
        wrap = ": give a function that calls it, the same one each time" if callable(value) else ""
        raise TypeError(
            f"{name} is a {type(value).__name__} without a hash, by which programs are told apart{wrap}"
        ) from error
    return value
