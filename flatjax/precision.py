"""Matrix products at the full precision of their inputs, which a GPU or a TPU does not give by default."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Traces `function` with float32 products in float32, never in TF32 or bfloat16: its sums cancel."""

    @functools.wraps(function)
    def at_full_precision(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return at_full_precision
