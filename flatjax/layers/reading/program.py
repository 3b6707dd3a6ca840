"""A loss as a traced program, and which of its values are made of data."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from flatjax.core.trees import Tree, arrays_by_path
from flatjax.curvature.products import checked_scalar

CALLS = ("jit", "pjit", "checkpoint", "remat", "remat2", "closed_call", "core_call", "custom_jvp_call",
         "custom_vjp_call", "custom_vjp_call_jaxpr", "shard_map", "custom_lin")  # fmt: skip
"""Operations that are a program of their own, with the same operands and results."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced loss, with what it is called with."""

    traced: ClosedJaxpr
    arguments: list[Any]
    places: dict[str, int]
    """The places of the parameters among the arguments, by path."""

    @classmethod
    def of(cls, loss_fn: Callable[..., Any], params: Tree, batch: tuple[Any, ...]) -> "Program":
        places = {path: place for place, path in enumerate(arrays_by_path(params))}
        arguments, tree = jax.tree.flatten((params, batch))
        traced = jax.make_jaxpr(lambda *leaves: _call(loss_fn, tree, leaves))(*arguments)
        return cls(traced, arguments, places)

    @functools.cached_property
    def origins(self) -> "Origins":
        """Where the values come from: the batch is data; without a batch, what the loss has closed over is."""
        program, num_params = self.traced.jaxpr, len(self.places)
        params, batch = program.invars[:num_params], program.invars[num_params:]
        return Origins.of(program, params, batch or program.constvars)


class Origins(NamedTuple):
    """Which values of a program are made of parameters, and which of data."""

    of_params: frozenset[Var]
    of_data: frozenset[Var]

    @classmethod
    def of(cls, program: Jaxpr, params: Sequence[Var], data: Sequence[Var]) -> "Origins":
        return cls(_reached(program, params), _reached(program, data))

    def is_data(self, value: Any) -> bool:
        return isinstance(value, Var) and value in self.of_data

    def is_parameter(self, value: Any) -> bool:
        """Whether a value is made of parameters and of no data."""
        return isinstance(value, Var) and value in self.of_params and value not in self.of_data

    def within(self, program: Jaxpr, inner: Sequence[Var], outer: Sequence[Any]) -> "Origins":
        """The origins in a program that is called, whose variables `inner` are given the values `outer`."""
        pairs = [(var, value) for var, value in zip(inner, outer, strict=True) if isinstance(value, Var)]
        return Origins.of(
            program,
            [var for var, value in pairs if value in self.of_params],
            [var for var, value in pairs if value in self.of_data],
        )

    def within_loop(self, program: Jaxpr, outer: Sequence[Any], first_carry: int, num_carry: int) -> "Origins":
        """The origins in the body of a `scan`.

        What is carried is made of what it begins as, and of what a step adds.
        """
        inner = list(program.invars)
        origins, before = self.within(program, inner, outer), None
        while origins != before:
            before = origins
            carried = zip(inner[first_carry : first_carry + num_carry], program.outvars, strict=False)
            pairs = [(var, value) for var, value in carried if isinstance(value, Var)]
            given = [var for var in inner if var in origins.of_params], [var for var in inner if var in origins.of_data]
            origins = Origins.of(
                program,
                [*given[0], *(var for var, value in pairs if value in origins.of_params)],
                [*given[1], *(var for var, value in pairs if value in origins.of_data)],
            )
        return origins


def called(equation: JaxprEqn) -> Jaxpr | None:
    """The program that a call runs; None for another operation."""
    if equation.primitive.name not in CALLS:
        return None
    params = equation.params
    program = next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params)
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def programs_in(values: Any) -> list[Jaxpr]:
    """All programs among the parameters of an operation."""
    if isinstance(values, ClosedJaxpr):
        return [values.jaxpr]
    if isinstance(values, Jaxpr):
        return [values]
    if isinstance(values, tuple | list):
        return [program for value in values for program in programs_in(value)]
    return []


def _reached(program: Jaxpr, start: Sequence[Var]) -> frozenset[Var]:
    reached = set(start)
    for equation in program.eqns:
        if any(isinstance(value, Var) and value in reached for value in equation.invars):
            reached.update(value for value in equation.outvars if isinstance(value, Var))
    return frozenset(reached)


def _call(loss_fn: Callable[..., Any], tree: Any, leaves: Sequence[Any]) -> Any:
    params, batch = jax.tree.unflatten(tree, leaves)
    return checked_scalar(loss_fn(params, *batch))
