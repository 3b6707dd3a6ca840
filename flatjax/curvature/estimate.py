"""A number that was estimated, with its standard error."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from flatjax.core import results
from flatjax.core.integers import whole_number
from flatjax.core.units import unit_near


class Estimate(NamedTuple):
    """An estimate, exact if no probes were needed.

    If it is of several numbers at once, value and error are trees of arrays.
    """

    value: Float[Array, "..."] | Any
    standard_error: Float[Array, "..."] | Any
    """The standard error of the value, as a standard deviation over repetitions; 0 if it is exact."""
    num_probes: Integer[Array, ""]
    """The number of random draws that it is the mean of; 0 if it is exact."""

    to_dict = results.to_dict
    __str__ = results.to_table


@jax.jit
def mean_of(samples: Float[Array, "k ..."]) -> Estimate:
    """The mean of independent draws along the first axis.

    Raises:
        ValueError: there are fewer than 2, which have no standard error.
    """
    num_probes = len(samples)
    check_num_probes(num_probes)
    unit = unit_near(jnp.max(jnp.abs(samples), axis=0))
    scaled = samples / unit[None]
    standard_error = unit * jnp.std(scaled, axis=0, ddof=1) / num_probes**0.5
    return Estimate(unit * jnp.mean(scaled, axis=0), standard_error, jnp.asarray(num_probes, jnp.int32))


def exactly(value: Float[Array, "..."]) -> Estimate:
    """Makes an estimate of what is known without probes."""
    return Estimate(value, jnp.zeros_like(value), jnp.zeros((), jnp.int32))


def check_num_probes(num_probes: int) -> None:
    """Raises a ValueError if there are fewer than 2, and a TypeError if that is no whole number."""
    if whole_number(num_probes, "num_probes") < 2:
        raise ValueError(f"num_probes is {num_probes}, wanted at least 2: of one alone there is no standard error")
