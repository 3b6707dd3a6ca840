"""Sharpness-aware minimisation: descend by the gradient of a point uphill."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flatjax.core.dtypes import computing_dtype
from flatjax.core.sharding import axis_names, varying_along
from flatjax.core.trees import Tree
from flatjax.curvature.vectors import unit
from flatjax.training.wrappers import check_given

GradFn = Callable[[Tree, int], Tree]


def sharpness_aware(
    optimizer: optax.GradientTransformation,
    radius: optax.ScalarOrSchedule,
    *,
    adaptive: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sharpness-aware minimisation (SAM), or its adaptive form (ASAM), around any optimizer.

        ε = ρ g / ‖g‖, or adaptive ε = ρ w² g / ‖|w| g‖;    the optimizer is given ∇L(w + ε) in the place of g = ∇L(w)

    A step takes a second gradient by `grad_fn`:

        tx.update(grads, state, params, grad_fn=lambda params, _: jax.grad(loss)(params, batch))

    What stands before it in a chain changes only the ascent, as the second gradient takes the place of all that came
    in. Clipping, decay and regularisers belong into `optimizer`, which is passed all further extra arguments. It has to
    see all parameters as `grad_fn` takes them, so it stands around `optax.masked`, `partition` or `flatten`, not in
    them. In `optax.MultiSteps` the second gradient is that of the last small batch only.

    Args:
        optimizer: the optimizer that descends.
        radius: ρ, a number or a schedule of the steps. Under `optax.inject_hyperparams` a number can be changed.
        adaptive: scale the ascent by the size of each weight, so that it does not change with a rescaling of layers.
            No constant is added to |w|, for biases as little: what is 0 stays.
        axis_name: the axis of a `jax.shard_map` or `jax.vmap` along which each device has its own samples. `grad_fn`
            gives the gradient of their mean, and that is averaged. The gradient that comes in is taken as it is: if it
            is averaged, all devices climb as one; if not, each climbs by itself, as SAM's authors did (m-sharpness).
            Leave it out for a `grad_fn` of a loss that is averaged over the devices already.

    Returns:
        A transformation whose update takes `grad_fn`, `(params, i) -> gradients`, by keyword; i is 0.

    Raises:
        TypeError: at an update, without `grad_fn` or `params`, or where a wrapper lost them, which is named; or
            `grad_fn` returns no tree like the parameters.

    Notes:
        A step costs two gradients: the one it is given, and the one it takes by `grad_fn`. It is `optax.contrib.sam`
        with an ascent that is 0 where the gradient is, and finite wherever the gradient is: no square in a norm over-
        or underflows. A gradient that is not finite makes ε NaN. ε is added in the dtype of the parameters: in bfloat16
        what is less than 0.2 % of a weight is rounded away.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> def loss(w):
        ...     return jnp.sum(w**2) / 2
        >>> tx, w = sharpness_aware(optax.sgd(0.1), radius=0.5), jnp.array([3.0, 4.0])
        >>> state = tx.init(w)
        >>> updates, state = tx.update(jax.grad(loss)(w), state, w, grad_fn=lambda w, _: jax.grad(loss)(w))
        >>> print(updates)  # −0.1 (w + 0.5 w/‖w‖)
        [-0.33 -0.44]

    References:
        Foret, Kleiner, Mobahi, Neyshabur: *Sharpness-Aware Minimization*, ICLR 2021.
        Kwon, Kim, Park, Choi: *ASAM: Adaptive Sharpness-Aware Minimization*, ICML 2021.
    """
    names: Any = axis_names(axis_name) or None
    schedule = radius if callable(radius) else optax.constant_schedule(radius)
    ascent = optax.chain(_ascent_direction(adaptive=adaptive), optax.sgd(schedule))
    descent = optax.with_extra_args_support(optimizer)

    def sam(**extra_args: Any) -> optax.GradientTransformationExtraArgs:
        bound = optax.GradientTransformation(descent.init, functools.partial(descent.update, **extra_args))
        # A state that is reset would hold the schedule at its first step.
        return optax.contrib.sam(bound, ascent, reset_state=False, opaque_mode=True, batch_axis_name=names)

    def update(
        updates: Tree, state: Any, params: Tree = None, *, grad_fn: GradFn | None = None, **extra_args: Any
    ) -> tuple[Tree, Any]:
        check_given("sharpness_aware", params, {"grad_fn": grad_fn}, {"grad_fn": "lambda params, _: ..."})
        assert grad_fn is not None

        def local_grad_fn(params: Tree, i: int) -> Tree:
            # In a `jax.shard_map` gradients in what is the same on all devices are summed unasked.
            gradients = grad_fn(varying_along(params, names or ()), i)
            if jax.tree.structure(gradients) != jax.tree.structure(params):
                raise TypeError(
                    f"grad_fn returned {jax.tree.structure(gradients)}, wanted a gradient like the parameters, "
                    f"{jax.tree.structure(params)}: jax.grad of the loss, not jax.value_and_grad"
                )
            return gradients

        return sam(**extra_args).update(updates, state, params, grad_fn=local_grad_fn)

    return optax.GradientTransformationExtraArgs(sam().init, update)


def _ascent_direction(*, adaptive: bool) -> optax.GradientTransformation:
    def direction(grads: Tree, params: Tree) -> Tree:
        dtype = computing_dtype((grads, params))
        ascent = unit(jax.tree.map(lambda g: g.astype(dtype), grads))
        if adaptive:
            sizes = jax.tree.map(lambda w: jnp.abs(w).astype(dtype), params)
            ascent = _product(sizes, unit(_product(sizes, ascent)))
        return jax.tree.map(lambda leaf, w: leaf.astype(w.dtype), ascent, params)

    return optax.stateless(direction)


def _product(x: Tree, y: Tree) -> Tree:
    return jax.tree.map(jnp.multiply, x, y)
