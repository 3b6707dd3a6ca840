"""The dtype in which models sum: float64 if given, else float32."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def at_least_float32(dtype: DTypeLike) -> DTypeLike:
    """Promotes a dtype to float32 at least: `jnp.promote_types` refuses float64 under strict promotion."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32
