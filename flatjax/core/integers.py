"""Whole numbers that are known when a program is traced, whether of Python, NumPy or JAX."""

import operator
from typing import Any

import jax
import numpy as np


def is_whole_number(value: Any) -> bool:
    """Whether the value is an integer, or an array of one; a boolean is not."""
    dtype = getattr(value, "dtype", type(value))
    is_integer = np.issubdtype(dtype, np.integer) if isinstance(dtype, type | np.dtype) else False
    return is_integer and getattr(value, "shape", ()) == ()


def known_integer(value: Any, name: str) -> int | None:
    """Reads an integer, and returns None for one that is traced.

    Raises:
        TypeError: it is no whole number.
    """
    if not is_whole_number(value):
        got = f"has dtype {value.dtype} and shape {value.shape}" if hasattr(value, "dtype") else f"is {value!r}"
        raise TypeError(f"{name} {got}, wanted one integer")
    return None if isinstance(value, jax.core.Tracer) else operator.index(value)


def whole_number(value: Any, name: str, *, least: int | None = None) -> int:
    """Reads a size, a number of draws or the like as an int.

    Raises:
        TypeError: it is no whole number, or is traced, where the program depends on it.
        ValueError: it is below the least that there may be.
    """
    number = known_integer(value, name)
    if number is None:
        raise TypeError(f"{name} is traced, wanted a number that is static under jit")
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}, wanted at least {least}")
    return number
