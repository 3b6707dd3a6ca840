"""Draw probes until an estimate is close enough or there were enough of them."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from flatjax.core.integers import whole_number
from flatjax.curvature.estimate import Estimate, check_num_probes
from flatjax.curvature.vectors import norm

State = TypeVar("State")


def estimated(
    add: Callable[[State, Key[Array, " k"]], State],
    estimate_of: Callable[[State], Estimate],
    state: State,
    key: Key[Array, ""],
    *,
    num_probes: int,
    relative_error: float | None,
    max_probes: int,
) -> Estimate:
    """Adds `num_probes` probes to a state, then as many again as there are, until the standard error is small enough.

    The i-th probe is the same however many there are. An estimate that is not finite does not get better.
    """
    check_num_probes(num_probes)
    num_probes, max_probes = int(num_probes), whole_number(max_probes, "max_probes")
    if relative_error is not None:
        if not relative_error > 0:
            raise ValueError(f"relative_error is {relative_error}, wanted it above 0, or None for num_probes probes")
        if max_probes < num_probes:
            raise ValueError(f"max_probes is {max_probes}, wanted at least num_probes, which is {num_probes}")
    state = add(state, _keys(key, 0, num_probes))
    estimate = estimate_of(state)
    while relative_error is not None and num_probes < max_probes and _is_far(estimate, relative_error):
        wanted = min(2 * num_probes, max_probes)
        state = add(state, _keys(key, num_probes, wanted))
        num_probes, estimate = wanted, estimate_of(state)
    return estimate


@functools.partial(jax.jit, static_argnums=(1, 2))
def _keys(key: Key[Array, ""], start: int, stop: int) -> Key[Array, " k"]:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(start, stop, dtype=jnp.uint32))


def _is_far(estimate: Estimate, relative_error: float) -> bool:
    error, size = norm(estimate.standard_error), norm(estimate.value)
    try:
        return bool(jnp.isfinite(error) & (error > relative_error * size))
    except jax.errors.ConcretizationTypeError:
        raise ValueError(
            "relative_error is given inside jit, where the number of probes cannot depend on what they show: leave it "
            "out and give num_probes, or call this outside of jit"
        ) from None
