"""Make functions of parts of a traced program."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxpr_as_fun


def as_function(
    program: Jaxpr, equations: Sequence[JaxprEqn], given: Sequence[Var], results: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Makes a function of some equations of a program; it takes the values of variables before them."""
    part = program.replace(constvars=[], invars=list(given), outvars=list(results), eqns=list(equations))
    return jaxpr_as_fun(ClosedJaxpr(part, ()))
