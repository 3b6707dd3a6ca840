"""Exact powers of two, to bring numbers to where their squares neither overflow nor vanish."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def power_of_two(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The one nearest to |x|, so that dividing by it rounds nothing; 1 for 0 and for what is not finite.

    A constant: it has no derivative.
    """
    info = jnp.finfo(x.dtype)
    # Rounded to no digit behind the first.
    power = jax.lax.reduce_precision(jnp.abs(jax.lax.stop_gradient(x)), exponent_bits=info.nexp, mantissa_bits=0)
    return jnp.where((power > 0) & jnp.isfinite(power), power, 1)
