"""Take traced programs apart, and put the axes of their convolutions in an order that XLA compiles well on a CPU.

XLA has a fast kernel for one order there, (batch, space, features) and (space, in, out). It brings others to it only
outside of loops. In a loop, what the derivative of a convolution is made of takes ten to thirty times as long.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array

from flatjax.core.trees import Tree


def with_convolutions_in_order(function: Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
    """Makes the same function with the same program, but for the order of the axes in its convolutions."""
    if jax.default_backend() != "cpu":
        return function

    def ordered(argument: Tree) -> Tree:
        program, shape = jax.make_jaxpr(function, return_shape=True)(argument)
        if not _has_convolutions(program.jaxpr):
            return function(argument)
        results = _run(program.jaxpr, program.consts, jax.tree.leaves(argument))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return ordered


def as_function(
    program: Jaxpr, equations: Sequence[JaxprEqn], given: Sequence[Var], results: Sequence[Any]
) -> Callable[..., list[Any]]:
    """Some equations of a program, as a function of the values of variables before them."""
    part = program.replace(constvars=[], invars=list(given), outvars=list(results), eqns=list(equations))
    return jaxpr_as_fun(ClosedJaxpr(part, ()))


_CONVOLUTION = "conv_general_dilated"
_CALLS = ("jit", "pjit")


def _has_convolutions(program: Jaxpr) -> bool:
    return any(
        equation.primitive.name == _CONVOLUTION
        or (equation.primitive.name in _CALLS and _has_convolutions(equation.params["jaxpr"].jaxpr))
        for equation in program.eqns
    )


def _run(program: Jaxpr, consts: list[Any], arguments: list[Any]) -> list[Any]:
    values = dict(zip((*program.constvars, *program.invars), (*consts, *arguments), strict=True))

    def read(operand: Any) -> Any:
        return operand.val if isinstance(operand, Literal) else values[operand]

    for equation in program.eqns:
        operands = [read(operand) for operand in equation.invars]
        values |= dict(zip(equation.outvars, _results(program, equation, operands), strict=True))
    return [read(result) for result in program.outvars]


def _results(program: Jaxpr, equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    name = equation.primitive.name
    if name == _CONVOLUTION:
        return [_convolution(*operands, **equation.params)]
    if name in _CALLS and _has_convolutions(equation.params["jaxpr"].jaxpr):
        called = equation.params["jaxpr"]
        return _run(called.jaxpr, called.consts, operands)
    known = {operand: i for i, operand in enumerate(equation.invars) if not isinstance(operand, Literal)}
    run = as_function(program, [equation], list(known), equation.outvars)
    return run(*(operands[i] for i in known.values()))


def _convolution(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    (batch, feature, *space), (out, into, *window), (batch_out, feature_out, *space_out) = dimension_numbers
    first, *middle, last = range(lhs.ndim)
    result = jax.lax.conv_general_dilated(
        jax.lax.transpose(lhs, (batch, *space, feature)),
        jax.lax.transpose(rhs, (*window, into, out)),
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            (first, last, *middle), (last, last - 1, *range(last - 1)), (first, last, *middle)
        ),
        **params,
    )
    place = {axis: i for i, axis in enumerate((batch_out, *space_out, feature_out))}
    return jax.lax.transpose(result, tuple(place[axis] for axis in range(result.ndim)))
