"""The dtype that formulas are computed in."""

from typing import Any

import jax
import jax.numpy as jnp


def computing_dtype(*values: Any) -> jnp.dtype:
    """The dtype to compute and to sum in: float64 if any of some dtypes or arrays, or trees of them, is, else float32.

    `jnp.promote_types` under strict promotion refuses float64 beside another dtype.
    """
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(values)]
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)
