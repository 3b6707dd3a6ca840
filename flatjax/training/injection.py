"""The gradient of a penalty added to the updates in an optimizer chain: what `flat_reg` and `collapse_reg` share."""

import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from flatjax.curvature.leaves import Tree
from flatjax.sharding import axis_names, varying_along, varying_axes
from flatjax.training.arguments import check_fits, check_given

Strength: TypeAlias = ArrayLike | optax.Schedule
"""λ, or λ of the number of updates so far."""

Gradient: TypeAlias = Callable[..., tuple[Float[Array, ""], Tree]]
"""`(params, **needed) -> (value, gradient)`; the gradient is None at leaves that it leaves alone."""


def injection(
    name: str,
    strength: Strength,
    gradient: Gradient,
    needed: tuple[str, ...],
    new_state: Callable[[Int[Array, ""], Float[Array, ""]], Any],
) -> optax.GradientTransformationExtraArgs:
    """Adds λ times a gradient to the updates; `needed` are the arguments of `update` that the gradient is of.

    The state is made of the number of updates and of the last value, in float32: NaN before the first.
    """
    if not callable(strength) and not _is_real_number(strength):
        raise ValueError(f"strength is {strength!r}, wanted a real number or a schedule")

    def init(params: Tree) -> Any:
        check_fits(name)
        return new_state(jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, jnp.float32))

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, Any]:
        check_given(name, params, extra_args, {each: each for each in needed})
        value, gradients = gradient(params, **{each: extra_args[each] for each in needed})
        rate = strength(state.count) if callable(strength) else strength
        count = jnp.asarray(optax.safe_increment(state.count))
        return _added(updates, rate, gradients), new_state(count, value.astype(jnp.float32))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_real_number(value: Any) -> bool:
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    return isinstance(value, numbers.Real) or (is_array and value.ndim == 0 and jnp.isrealobj(value))


def of_penalty(penalty: Callable[..., Any], name: str, axis_name: str | tuple[str, ...] | None) -> Gradient:
    """That of `penalty(params, batch)` in all parameters, averaged over the devices along an axis."""

    def gradient(params: Tree, *, batch: Any) -> tuple[Float[Array, ""], Tree]:
        check_unmasked(params, name)

        def scalar(params: Tree) -> Float[Array, ""]:
            value = penalty(params, batch)
            if not (isinstance(value, jax.Array) and value.shape == () and jnp.issubdtype(value.dtype, jnp.floating)):
                got = f"{value.dtype}{value.shape}" if isinstance(value, jax.Array) else type(value).__name__
                raise TypeError(f"penalty returned {got}, wanted a scalar of a floating dtype")
            return value

        return averaged(jax.value_and_grad(scalar), axis_name)(params)

    return gradient


def averaged(
    value_and_gradient: Callable[[Tree], tuple[Float[Array, ""], Tree]], axis_name: str | tuple[str, ...] | None
) -> Callable[[Tree], tuple[Float[Array, ""], Tree]]:
    """The mean of what the devices along an axis of a `jax.shard_map` find, each on its own samples."""
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
        return jax.lax.pmean((value, gradient), names)

    return mean


def check_unmasked(params: Tree, name: str) -> None:
    """Raises a ValueError where leaves are hidden."""
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            f"{name} is inside optax.masked or optax.partition, which hide parameters that it is a function of: put it "
            f"before them, as in optax.chain({name}(...), optax.masked(...))"
        )


def _added(updates: Tree, rate: Any, gradients: Tree) -> Tree:
    def added(update: Array, gradient: Array | None) -> Array:
        if gradient is None:
            return update
        dtype = jnp.float64 if jnp.float64 in (update.dtype, gradient.dtype) else jnp.float32
        wide = gradient.astype(dtype)
        # 0 · ∞ would be NaN. Another gradient is multiplied by 0, too: so the result has its slope in the rate.
        is_left_out = (jnp.asarray(rate) == 0) & ~jnp.isfinite(wide)
        step = jnp.where(is_left_out, 0, jnp.asarray(rate, dtype) * wide)
        return (update.astype(dtype) + step).astype(update.dtype)

    return jax.tree.map(added, updates, gradients)
