"""Run a program again, with the outputs of a layer shifted where they arise."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Array, Float, Integer

from flatjax.curvature.jaxprs import as_function
from flatjax.layers.reading.products import LayerProduct
from flatjax.layers.reading.program import called

Products = Mapping[tuple[int, ...], LayerProduct]
"""Products by their places: the numbers of the equations that they lie in, and their own."""


def rerun(
    program: Jaxpr,
    arguments: Sequence[Any],
    products: Products,
    shift: Float[Array, "n d"],
    index: Integer[Array, ""] | int,
    steps: Mapping[Var, Any] | None = None,
) -> tuple[list[Any], Float[Array, "n m"]]:
    """Runs a program again: the results, and the features of the layer at `index`.

    The `arguments` begin with the program's constants.
    """
    steps = steps or {}
    given = [*program.constvars, *program.invars]
    values: dict[Var, Any] = dict(zip(given, arguments, strict=True))
    places = sorted({place[0] for place in products})
    feats: Any = 0
    done = 0
    for place in places:
        equation = program.eqns[place]
        wanted = {var for product in products.values() for var in product.wanted}
        values |= _results(program, done, place, values, wanted)
        inner = {rest[1:]: product for rest, product in products.items() if rest[0] == place}
        operands = [value.val if isinstance(value, Literal) else values[value] for value in equation.invars]
        if () in inner:
            result, more = inner[()].shifted(operands, {**values, **steps}, shift, index)
            results = [result]
        elif equation.primitive.name == "scan":
            results, more = _scan(equation, operands, inner, shift, index, steps)
        else:
            within = called(equation)
            assert within is not None
            results, more = rerun(within, [*_consts(equation), *operands], inner, shift, index, steps)
        values |= dict(zip(equation.outvars, results, strict=True))
        feats = feats + more
        done = place + 1
    values |= _results(program, done, len(program.eqns), values, set())
    return [value.val if isinstance(value, Literal) else values[value] for value in program.outvars], feats


def _results(program: Jaxpr, start: int, stop: int, values: Mapping[Var, Any], wanted: set[Var]) -> dict[Var, Any]:
    """The values that some equations add, as far as later ones or the results need them."""
    equations = program.eqns[start:stop]
    later = {value for equation in program.eqns[stop:] for value in equation.invars if isinstance(value, Var)}
    later |= {value for value in program.outvars if isinstance(value, Var)} | wanted
    results = [value for equation in equations for value in equation.outvars if value in later]
    read = {value for equation in equations for value in equation.invars if isinstance(value, Var)}
    given = [value for value in values if value in read]
    run = as_function(program, equations, given, results)
    return dict(zip(results, run(*(values[value] for value in given)), strict=True))


def _scan(
    equation: JaxprEqn,
    operands: Sequence[Any],
    products: Products,
    shift: Float[Array, "n d"],
    index: Integer[Array, ""] | int,
    steps: Mapping[Var, Any],
) -> tuple[list[Any], Float[Array, "n m"]]:
    params = equation.params
    program: ClosedJaxpr = params["jaxpr"]
    first_carry, num_carry = params["num_consts"], params["num_carry"]
    first_stack = first_carry + num_carry
    stacks = program.jaxpr.invars[first_stack:]

    def body(carry: list[Any], xs: tuple[Any, list[Any]]) -> tuple[list[Any], tuple[list[Any], Any]]:
        step, slices = xs
        arguments = [*program.consts, *operands[:first_carry], *carry, *slices]
        of_step = {**steps, **dict.fromkeys(stacks, step)}
        results, feats = rerun(program.jaxpr, arguments, products, shift, index, of_step)
        return results[:num_carry], (results[num_carry:], feats)

    carry, (stacked, feats) = jax.lax.scan(
        body,
        list(operands[first_carry:first_stack]),
        (jnp.arange(params["length"]), list(operands[first_stack:])),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    # A layer is in one step, and elsewhere its features are 0.
    return [*carry, *stacked], jnp.sum(feats, axis=0)


def _consts(equation: JaxprEqn) -> list[Any]:
    params = equation.params
    program = next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)
    return list(program.consts) if isinstance(program, ClosedJaxpr) else []
