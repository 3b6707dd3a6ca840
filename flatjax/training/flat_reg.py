"""Regularise by relative flatness in any optimizer chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Float, Int

from flatjax.core.trees import Tree, leaf_path, leaves_by_path
from flatjax.curvature.counts import counted
from flatjax.flatness.relative import relative_flatness
from flatjax.training.injection import (
    Gradient,
    Strength,
    averaged,
    check_strength,
    check_unmasked,
    injection,
    of_penalty,
)
from flatjax.training.wrappers import with_static_arguments


class FlatRegState(NamedTuple):
    """The state of `flat_reg`; in that of a chain, `optax.tree.get(opt_state, "kappa")` finds κ."""

    count: Int[Array, ""]
    """The number of updates so far, which the strength may be a schedule of."""
    kappa: Float[Array, ""]
    """The penalty at the last update, in float32: κ, without λ. It is NaN before the first."""


@with_static_arguments
def flat_reg(
    strength: Strength,
    penalty: Callable[[Any, Any], Any] | None = None,
    *,
    head: str | None = None,
    metric: Callable[..., Any] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    count: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds λ∇κ, the exact gradient of relative flatness, to the updates: λ > 0 pushes flat, λ < 0 sharp.

    Call it with a penalty, `tx.update(grads, state, params, batch=batch)`, and the gradient is the whole one, third
    derivatives of the loss included, and reaches every parameter. Other samples than those of the loss, or some of
    them, are as valid.

    Call it without one, `tx.update(grads, state, params, feats=feats, labels=labels)`, and κ is that of a linear head.
    Only the head's own parameters then get a gradient, at fixed features. This leaves out what the layers before it
    could do, all that they change in ‖φ‖ and in how certain the head is, and they may undo what the head does. Any part
    of the batch will do, `feats[:, ::4]` for example.

    In `optax.chain(flat_reg(λ), optax.adamw(η))` the term is coupled: it is part of the gradient, as an L2 penalty
    would be, and Adam rescales it with the rest. Between `optax.scale_by_adam()` and `optax.scale_by_learning_rate(η)`
    it is decoupled, as AdamW's weight decay: the step is −η (Adam's direction + λ∇κ), and nothing rescales λ∇κ.

    Args:
        strength: λ, a finite number or a schedule, a function of the number of updates; κ has the unit of the loss.
            While it is 0, as at the start of a warm-up, a gradient that is not finite adds nothing. κ is measured
            nonetheless, and not hidden where it is NaN.
        penalty: `(params, batch) -> scalar`, differentiable. It may be κ of any layer, by `relative_flatness` of the
            features that enter it.
        head: where the head is among the parameters, "decoder/head"; by default they are a head. Without `penalty`.
        metric: `(head, feats, labels) -> scalar`, by default `relative_flatness`; `simplified_relative_flatness` for κ̂.
            Without `penalty`.
        axis_name: inside a `jax.shard_map`, the axis or axes along which the samples are split: the gradient is the
            mean over its devices, by how many samples of each count. Not for a penalty that is averaged over them
            already. Under `jit` of sharded arrays leave it out.
        count: how many samples count, a function of the batch, or of features and labels without `penalty`. By default
            it is what `flatjax.curvature.num_samples` reads off them: labels that are not −100, by their weights if
            there are any.

    Returns:
        A transformation whose state is a `FlatRegState`. If there are several in a chain, `optax.tree.get(state,
        "kappa")` finds more than one κ, which is an error: in an `optax.named_chain(("flat", flat_reg(...)), ...)` it
        is `optax.tree.get(state, "flat").kappa`.

    Raises:
        TypeError: an argument of `update` is missing, or was lost in a wrapper, which is named; the penalty is no
            scalar, or stands where the strength belongs; or `optax.inject_hyperparams` is not told what is static.
        ValueError: parameters that are hidden, no head where `head` says, a `head` or a `metric` besides
            a `penalty`, a strength that is no finite number, or samples that are split along an axis that is not named.

    Notes:
        Cost: what the penalty shares with the loss is computed once where both are in one jitted function, but the
        backward pass runs twice. A joint loss is cheaper, for a head `cross_entropy_and_flatness`. Without a penalty it
        costs no backward pass, but products of the features with the head.

        It works inside `optax.chain`, `named_chain`, `apply_if_finite`, in `nnx.Optimizer` (`optimizer.update(model,
        grads, batch=batch)`), under `jit`, `lax.scan` and donation. In `optax.inject_hyperparams(flat_reg,
        static_args="penalty")` name all functions that are given, for example ("penalty", "count"). `optax.MultiSteps`
        uses only the last batch of those it accumulates if this is inside: put it before,
        `optax.chain(flat_reg(...), optax.MultiSteps(...).gradient_transformation())`. `optax.masked` and `partition`
        hide parameters, and `flatten` and `lookahead` do not fit: put this before them. A Linen
        `TrainState.apply_gradients` passes no arguments on. These two lines do:

            updates, opt_state = state.tx.update(grads, state.opt_state, state.params, batch=batch)
            state = state.replace(
                step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)

        The penalty decides what is held fixed while κ is measured. The statistics of a batch make its samples interact,
        so that κ depends on which of them are together: normalise by the running ones. Dropout draws a new mask at
        every call: switch it off, or give it the same key. In Linen these are

            model.apply({"params": params, "batch_stats": batch_stats}, x, train=False)
            model.apply({"params": params}, x, deterministic=False, rngs={"dropout": key})

        with `train` or `deterministic` as the model calls it. In NNX, after `model.eval()` and `graphdef, params, rest
        = nnx.split(model, nnx.Param, ...)`, it is

            nnx.merge(graphdef, params, rest, copy=True)(x)

        After `model.train()` instead, κ is by the statistics of the batch, and with the same mask at every call, as it
        is drawn from the keys in `rest`. `copy=True` has statistics and keys written to a copy: flax refuses to write
        to those outside of a derivative in it. Running statistics go with the batch: `batch=(rest, x, labels)`.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flatjax import cross_entropy, flat_reg, relative_flatness
        >>> def features(params, x):
        ...     return jnp.tanh(x @ params["body"]["kernel"])
        >>> def loss(params, batch):
        ...     x, y = batch
        ...     return cross_entropy(features(params, x) @ params["head"]["kernel"], y).mean()
        >>> def penalty(params, batch):
        ...     x, y = batch
        ...     return relative_flatness(params["head"], features(params, x), y)
        >>> keys, f32 = jax.random.split(jax.random.key(0)), jnp.float32
        >>> params = {"body": {"kernel": jnp.eye(3, 4, dtype=f32)}, "head": {"kernel": jnp.eye(4, 2, dtype=f32)}}
        >>> batch = jax.random.normal(keys[0], (8, 3), f32), jnp.arange(8) % 2
        >>> tx = optax.chain(flat_reg(0.1, penalty), optax.sgd(1e-2))
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(loss)(params, batch)
        ...     updates, state = tx.update(grads, state, params, batch=batch)
        ...     return optax.apply_updates(params, updates), state
        >>> new_params, state = step(params, tx.init(params))
        >>> bool(optax.tree.get(state, "kappa") == penalty(params, batch))
        True

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021 (κ).
        Adilova, Abourayya, Li, Dada, Petzka, Egger, Kleesiek, Kamp: *FAM: Relative Flatness Aware Minimization*, 2023.
    """
    check_strength("flat_reg", strength)
    if penalty is None:
        gradient = _of_head(head, metric or relative_flatness, axis_name, count)
        return injection("flat_reg", strength, gradient, ("feats", "labels"), FlatRegState)
    if head is not None or metric is not None:
        raise ValueError(
            f"flat_reg has a penalty besides head={head!r} and metric={metric!r}, wanted one or the other: a penalty "
            "finds its own head and is its own metric"
        )
    return injection("flat_reg", strength, of_penalty(penalty, "flat_reg", axis_name, count), ("batch",), FlatRegState)


def _of_head(
    head: str | None,
    metric: Callable[..., Any],
    axis_name: str | tuple[str, ...] | None,
    count: Callable[..., Any] | None,
) -> Gradient:
    def gradient(params: Tree, *, feats: Any, labels: Any) -> tuple[Float[Array, ""], Tree]:
        paths = _paths_of_head(params, head)
        leaves = leaves_by_path(params)

        def of(head_params: dict[str, Array]) -> Float[Array, ""]:
            return metric(head_params, jax.lax.stop_gradient(feats), labels)

        mean = averaged(jax.value_and_grad(of), axis_name, lambda: counted((feats, labels), count))
        value, by_name = mean({key: leaves[paths[key]] for key in paths})
        by_path = {paths[key]: by_name[key] for key in paths}
        return value, jax.tree_util.tree_map_with_path(lambda keys, _: by_path.get(leaf_path(keys)), params)

    return gradient


def _paths_of_head(params: Tree, head: str | None) -> dict[str, str]:
    """Finds the leaves of the head, by their names in it.

    Raises:
        ValueError: there are none.
    """
    prefix = "" if head is None else f"{head}/"
    hidden = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    check_unmasked([leaf for keys, leaf in hidden if f"{leaf_path(keys)}/".startswith(prefix)], "flat_reg")
    paths = [path for path in leaves_by_path(params) if path.startswith(prefix)]
    names = {path.removeprefix(prefix): path for path in paths}
    if not names or any("/" in name for name in names):
        found = {path.rpartition("/")[0] for path in leaves_by_path(params) if path.endswith(("kernel", "embedding"))}
        raise ValueError(
            f"flat_reg(head={head!r}) finds no linear head in params: give head=... as one of {sorted(found)}, or a "
            "penalty"
        )
    return names
