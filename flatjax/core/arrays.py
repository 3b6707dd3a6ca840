"""Read what callers have for arrays: JAX's and NumPy's, lists, and live tensors of frameworks not imported here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_arrays(name: str, value: Any, *, are_classes: bool = False) -> Any:
    """Turns a value into a tree of arrays that `jax.jit` takes; what is one already stays the object that it is.

    JAX may have no room for integers of 64 bits, which would wrap around there. Classes are therefore cut to the range,
    which leaves them out of that of any head. Other numbers become floating.

    Raises:
        TypeError: text, objects, or a tensor that is not dense and in reach.
        ValueError: a list that is ragged.
    """
    if value is None or isinstance(value, jax.Array | bool | int | float | complex):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _in_range_of_jax(_of_numbers(name, value), are_classes)
    if hasattr(value, "__jax_array__"):
        return jnp.asarray(value)
    if hasattr(value, "__dlpack__") or hasattr(value, "__array__"):
        return _in_range_of_jax(_of_numbers(name, _of_tensor(name, value)), are_classes)
    if type(value) in (list, tuple):
        return as_arrays(name, _of_sequence(name, value, are_classes), are_classes=are_classes)
    if not are_classes and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
        return value
    leaves, structure = jax.tree_util.tree_flatten_with_path(value)
    if are_classes:
        raise TypeError(f"{name} is a {type(value).__name__}, wanted integers{_AS_CLASSES}")
    if len(leaves) == 1 and leaves[0][1] is value:
        raise TypeError(f"{name} is a {type(value).__name__}, wanted an array")
    read = [as_arrays(name + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    is_same = all(new is old for new, (_, old) in zip(read, leaves, strict=True))
    return value if is_same else structure.unflatten(read)


def one_number(name: str, value: Any) -> jax.Array:
    """A real number that a metric takes one of at a time.

    Raises:
        TypeError: it is no real number.
        ValueError: it is an array of several, or of another shape than ().
    """
    if value is None or (array := jnp.asarray(value)).dtype.kind not in "fiuV":
        raise TypeError(f"{name} is {value!r}, wanted a real number")
    if array.shape != ():
        raise ValueError(
            f"{name} has shape {array.shape}, wanted one number: of several take jax.vmap, or one call for each"
        )
    return array


def holds_keys(value: Any) -> bool:
    """Whether an array is of keys of `jax.random`, new or raw (uint32, of the shape of a key)."""
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return False
    is_raw = dtype == np.uint32 and value.shape[-1:] == jax.eval_shape(jax.random.PRNGKey, 0).shape
    return is_raw or jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def a_key(value: Any, name: str = "key") -> Any:
    """A key of `jax.random`, new or old.

    Raises:
        TypeError: it is none.
    """
    dtype = getattr(value, "dtype", None)
    if holds_keys(value) and value.ndim == (1 if dtype == np.uint32 else 0):
        return value
    got = f"an array of shape {value.shape} and dtype {dtype}" if dtype is not None else repr(value)
    raise TypeError(f"{name} is {got}, wanted one key: jax.random.key(seed)")


_AS_CLASSES = (
    ": number the classes as the outputs of the head are, {name: i for i, name in enumerate(names)}, or as they are "
    "sorted, np.unique(labels, return_inverse=True)[1]"
)


def _of_numbers(name: str, array: Any) -> Any:
    kind = array.dtype.kind
    if kind == "O" and any(isinstance(entry, str | bytes) for entry in array.flat):
        kind = "U"
    if kind in "UST":
        raise TypeError(f"{name} holds text, {str(array.flat[0])!r} first, wanted numbers{_AS_CLASSES}")
    if kind in "OMm":
        raise TypeError(f"{name} has dtype {array.dtype}, wanted numbers: {name}.astype(...) of what they are")
    return array


def _in_range_of_jax(array: Any, are_classes: bool) -> Any:
    if array.dtype.kind not in "iu" or jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype:
        return array
    lowest, highest = max(-(2**31), np.iinfo(array.dtype).min), 2**31 - 1
    if are_classes:
        return np.clip(array, lowest, highest)
    fits = array.size == 0 or (np.min(array) >= lowest and np.max(array) <= highest)
    return array if fits else array.astype(np.float32)


def _of_tensor(name: str, tensor: Any) -> Any:
    """Copies a tensor to NumPy, as training goes on and changes it; one on a device that JAX shares is read in place.

    Raises:
        TypeError: the tensor is neither dense nor in reach.
    """
    try:
        # What is trained does not give itself away.
        tensor = tensor.detach() if hasattr(tensor, "detach") else tensor
        if not hasattr(tensor, "__dlpack__"):
            return np.array(tensor)
        if int(tensor.__dlpack_device__()[0]) != _CPU:
            return jnp.from_dlpack(tensor)
        try:
            return np.array(np.from_dlpack(tensor))
        except (RuntimeError, BufferError):  # NumPy has no bfloat16 of its own
            return np.array(jnp.from_dlpack(tensor))
    except Exception as error:
        where = getattr(tensor, "device", "an unknown device")
        raise TypeError(
            f"{name} is a {type(tensor).__name__} on {where} that JAX cannot read, wanted a dense one on the CPU: "
            f"{name}.detach().cpu()"
        ) from error


_CPU = 1
"""The number that DLPack gives the CPU."""


def _of_sequence(name: str, values: list[Any] | tuple[Any, ...], are_classes: bool) -> Any:
    """Joins a sequence of numbers to one array, or stacks a sequence of arrays."""
    leaves = jax.tree.leaves(values)
    if not all(isinstance(leaf, bool | int | float | complex | str | bytes) for leaf in leaves):
        values = jax.tree.map(lambda leaf: as_arrays(name, leaf, are_classes=are_classes), values)
    try:
        return (jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np).asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is a {type(values).__name__} of parts of several shapes, wanted one shape") from error
