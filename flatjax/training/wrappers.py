"""Check the arguments that an update cannot do without, and name the wrappers in a chain that lose them."""

import inspect
import numbers
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def check_given(name: str, params: Any, given: Mapping[str, Any], call: Mapping[str, str]) -> None:
    """Checks that `update` of the transform `name` was given the parameters, and all that `call` writes down.

    Raises:
        TypeError: something is missing, or was lost in a wrapper, which is named.
    """
    missing = ["params"] if params is None else []
    missing += [each for each in call if given.get(each) is None]
    if not missing:
        return
    wrapper = _around(_FORGETFUL)
    reason = (
        f"It is inside {wrapper.format(name=name)}"
        if wrapper
        else "If it was given, a wrapper that is no optax.GradientTransformationExtraArgs lost it"
    )
    needed = ", ".join(f"{each}={written}" for each, written in call.items())
    raise TypeError(
        f"{name} got no {' and no '.join(missing)}: call tx.update(grads, state, params, {needed}), or of an "
        f"nnx.Optimizer optimizer.update(model, grads, {needed}). {reason}"
    )


def check_fits(name: str) -> None:
    """Checks, where a transform is initialised, that it is in no wrapper that it cannot work in.

    Raises:
        ValueError: it is in one, which is named.
    """
    wrapper = _around(_UNFIT)
    if wrapper is not None:
        raise ValueError(f"{name} is inside {wrapper.format(name=name)}")


_UNFIT = {
    "optax.transforms._layouts": "optax.flatten, which makes one vector of the parameters: put it before, as in "
    "optax.chain({name}(...), optax.flatten(...))",
    "optax._src.lookahead": "optax.lookahead, which passes no arguments on: put it before, with tx.update(grads, "
    "state, params) of the fast parameters, params.fast",
}
"""Wrappers that do not fit, by the module that an initialisation comes from."""

_FORGETFUL = {
    "optax._src.lookahead": _UNFIT["optax._src.lookahead"],
    "optax.transforms._accumulation": "optax.MultiSteps: give its update the arguments, and if "
    "they were lost in a chain around its gradient_transformation(), put {name} before it in that chain",
    "flax.training.train_state": "TrainState.apply_gradients, which passes no arguments on: call state.tx.update(grads,"
    " state.opt_state, state.params, ...) and state.replace(step=..., params=..., opt_state=...)",
}
"""Wrappers that lose arguments, by the module that an update comes from."""


def _around(wrappers: Mapping[str, str]) -> str | None:
    """The innermost of some wrappers that calls this: only its frame tells that arguments were lost in it."""
    return next((wrappers[module] for module, _ in _callers() if module in wrappers), None)


def _callers() -> Iterator[tuple[str, FrameType]]:
    """The frames that call this, from the innermost on, by their modules."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield str(frame.f_globals.get("__name__")), frame
        frame = frame.f_back


def with_static_arguments(factory: F) -> F:
    """Makes `optax.inject_hyperparams` of a factory of transforms fail where it is not told what is static.

    It takes each further function for a schedule, and each number for a hyperparameter. What it then raises comes from
    inside the caller's own function. Before that it calls nothing of a factory but `bind` of its signature, so that is
    where the check is.
    """
    signature = inspect.signature(factory)
    checked: Any = factory
    checked.__signature__ = _Signature(
        list(signature.parameters.values()), return_annotation=signature.return_annotation
    )
    return factory


class _Signature(inspect.Signature):
    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        injecting = next((frame for module, frame in _callers() if module == "optax.schedules._inject"), None)
        if injecting is not None and "static_args" in injecting.f_locals:
            bound.apply_defaults()
            _check_static(injecting.f_locals["static_args"], bound.arguments, injecting.f_locals["inner_factory"])
        return bound


def _check_static(static: Collection[str], arguments: Mapping[str, Any], factory: Callable[..., Any]) -> None:
    further = list(arguments.items())[1:]
    wanted = tuple(name for name, value in further if callable(value) or isinstance(value, numbers.Number))
    if taken := [name for name in wanted if name not in static]:
        given, name = repr(wanted[0] if len(wanted) == 1 else wanted), getattr(factory, "__name__", "factory")
        raise TypeError(
            f"optax.inject_hyperparams takes {' and '.join(taken)} for schedules or hyperparameters, wanted them among "
            f"its static_args: optax.inject_hyperparams({name}, static_args={given})"
        )
