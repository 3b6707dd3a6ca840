"""Add the gradient of a penalty to the updates in an optimizer chain: what `flat_reg` and `collapse_reg` share."""

import inspect
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from typing_extensions import TypeAliasType

from flatjax.core.arrays import as_arrays
from flatjax.core.dtypes import computing_dtype
from flatjax.core.sharding import axis_names, varying_along, varying_axes
from flatjax.core.trees import Tree
from flatjax.curvature.counts import counted
from flatjax.curvature.products import checked_scalar
from flatjax.training.wrappers import check_fits, check_given

Strength = TypeAliasType("Strength", ArrayLike | optax.Schedule)
"""The strength λ, or λ as a function of the number of updates so far."""

Gradient: TypeAlias = Callable[..., tuple[Float[Array, ""], Tree]]
"""A function `(params, **needed) -> (value, gradient)`; the gradient is None at leaves that it leaves alone."""


def injection(
    name: str,
    strength: Strength,
    gradient: Gradient,
    needed: tuple[str, ...],
    new_state: Callable[[Int[Array, ""], Float[Array, ""]], Any],
) -> optax.GradientTransformationExtraArgs:
    """Adds λ times a gradient to the updates; `needed` are the arguments of `update` that the gradient takes.

    The state is made of the number of updates and of the last value, in float32, which is NaN before the first.
    """
    gradient = _compiled(gradient)

    def init(params: Tree) -> Any:
        check_fits(name)
        return new_state(jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, jnp.float32))

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, Any]:
        check_given(name, params, extra_args, {each: each for each in needed})
        value, gradients = gradient(params, **{each: extra_args[each] for each in needed})
        rate = strength(state.count) if callable(strength) else strength
        if not _is_real_number(rate):
            raise ValueError(f"strength(count) is {rate!r}, wanted a schedule that returns a real number")
        count = jnp.asarray(optax.safe_increment(state.count))
        return _added(updates, rate, gradients), new_state(count, value.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


def check_strength(name: str, strength: Any) -> None:
    """Checks the λ that a transform `name` was given.

    Raises:
        TypeError: it is a function of more than the number of updates, as a penalty is.
        ValueError: it is no real number, or one that is known and not finite.
    """
    if callable(strength):
        if not _takes_one_argument(strength):
            raise TypeError(
                f"strength is a function of {inspect.signature(strength)}, wanted a number, or a schedule: a function "
                f"of the number of updates alone. A penalty comes second, {name}(strength, penalty)"
            )
        return
    if not _is_real_number(strength):
        raise ValueError(f"strength is {strength!r}, wanted a real number or a schedule")
    if not isinstance(strength, jax.core.Tracer) and not np.isfinite(strength):
        raise ValueError(f"strength is {strength}, wanted a finite number or a schedule")


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(0)
    except TypeError:
        return False
    except ValueError:  # of what is compiled there may be no signature
        return True
    return True


def _is_real_number(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return value.ndim == 0 and any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer))
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def of_penalty(
    penalty: Callable[..., Any],
    name: str,
    axis_name: str | tuple[str, ...] | None,
    count: Callable[[Any], Any] | None = None,
) -> Gradient:
    """Makes the gradient of `penalty(params, batch)` in all parameters, averaged over the devices along an axis."""
    if not callable(penalty):
        raise TypeError(f"penalty is {penalty!r}, wanted a function, (params, batch) -> scalar")

    def gradient(params: Tree, *, batch: Any) -> tuple[Float[Array, ""], Tree]:
        check_unmasked(params, name)

        def scalar(params: Tree) -> Float[Array, ""]:
            return checked_scalar(penalty(params, batch), "penalty")

        return averaged(jax.value_and_grad(scalar), axis_name, lambda: counted((batch,), count))(params)

    return gradient


def averaged(
    value_and_gradient: Callable[[Tree], tuple[Float[Array, ""], Tree]],
    axis_name: str | tuple[str, ...] | None,
    count: Callable[[], ArrayLike],
) -> Callable[[Tree], tuple[Float[Array, ""], Tree]]:
    """The mean of what the devices along an axis of a `jax.shard_map` find, by how many samples of each count."""
    names = axis_names(axis_name)

    def mean(params: Tree) -> tuple[Float[Array, ""], Tree]:
        if not names:
            value, gradient = value_and_gradient(params)
            if split := varying_axes(value) - varying_axes(params):
                raise ValueError(
                    f"the penalty differs along {sorted(split)}, along which a jax.shard_map splits the samples: give "
                    "them as axis_name, or average the penalty over them"
                )
            return value, gradient
        # By parameters that every device has, a derivative is summed over the devices, by default: not by copies.
        copies = varying_along(params, names)
        value, gradient = value_and_gradient(copies)
        if varying_axes(copies) and not set(names) <= varying_axes(value):
            raise ValueError(
                f"the penalty is the same on all devices along {axis_name!r}, which it must have been averaged over: "
                "leave axis_name out"
            )
        own = varying_along(jnp.asarray(count(), computing_dtype((value, gradient))), names)
        total = jax.lax.psum(own, names)

        def weighed(x: Array) -> Array:
            # Of a device that has padding alone the mean is 0/0, and counts nowhere; of all of them it is NaN.
            return jnp.where((own == 0) & (total != 0), 0, (own / total).astype(x.dtype) * x)

        return jax.lax.psum(jax.tree.map(weighed, (value, gradient)), names)

    return mean


def check_unmasked(params: Tree, name: str) -> None:
    """Raises a ValueError where leaves are hidden."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{name} is inside optax.masked or optax.partition, which hide parameters that it is a function of: put it "
            f"before them, as in optax.chain({name}(...), optax.masked(...))"
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) or (isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufV")


def _compiled(gradient: Gradient) -> Gradient:
    """Makes one program for each shape, where a batch holds only arrays.

    What else it holds may decide what is computed.
    """
    program = jax.jit(gradient)

    def call(params: Tree, **needed: Any) -> tuple[Float[Array, ""], Tree]:
        are_arrays = all(map(_is_array, jax.tree.leaves((params, needed))))
        return program(params, **jax.tree.map(in_range, needed)) if are_arrays else gradient(params, **needed)

    def in_range(leaf: Any) -> Any:
        # Integers of 64 bits may be labels, which would wrap around as they enter.
        return as_arrays("batch", leaf, are_classes=True)

    return call


@jax.jit
def _added(updates: Tree, rate: Any, gradients: Tree) -> Tree:
    def added(update: Array, gradient: Array | None) -> Array:
        if gradient is None:
            return update
        dtype = computing_dtype(update, gradient)
        wide = gradient.astype(dtype)
        # 0 · ∞ would be NaN. Another gradient is multiplied by 0, too: so the result has its slope in the rate.
        is_left_out = (jnp.asarray(rate) == 0) & ~jnp.isfinite(wide)
        step = jnp.where(is_left_out, 0, jnp.asarray(rate, dtype) * wide)
        return (update.astype(dtype) + step).astype(update.dtype)

    return jax.tree.map(added, updates, gradients)
