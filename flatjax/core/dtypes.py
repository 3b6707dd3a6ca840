"""In what a model accumulates."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """`jnp.promote_types` with float32, which under strict promotion refuses float64."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
