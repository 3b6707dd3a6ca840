"""Units to measure numbers in before they are squared, so that no square overflows or underflows."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def unit_near(size: Float[Array, "..."]) -> Float[Array, "..."]:
    """The power of 2 nearest to a size; 1 where the size is 0 or NaN. Dividing by it rounds nothing.

    It has no derivative: a number is the same in whatever unit it is measured.
    """
    limits = jnp.finfo(size.dtype)
    # Of numbers near the largest of all the reciprocal, by which a compiler multiplies, underflows.
    size = jnp.minimum(jax.lax.stop_gradient(size), float(limits.max) / 16)
    size = jnp.where(size >= float(limits.tiny), size, 1)
    return jax.lax.reduce_precision(size, exponent_bits=limits.nexp, mantissa_bits=0)


def root_of_squares(values: Float[Array, "k ..."]) -> Float[Array, "..."]:
    """The root √Σ x² along the first axis."""
    unit = unit_near(jnp.max(jnp.abs(values), axis=0, initial=0))
    return unit * jnp.sqrt(jnp.sum((values / unit[None]) ** 2, axis=0))


def safe_sqrt(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """√x with the derivative 0 at 0, where a distance is least, and where a weight of 0 leaves a value out."""
    return jnp.where(x == 0, 0, jnp.sqrt(jnp.where(x == 0, 1, x)))
