"""The Gauss-Newton relative flatness of all layers by one draw, to train with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.arrays import a_key
from flatjax.core.trees import Tree
from flatjax.layers.gauss_newton.cotangents import NAMED
from flatjax.layers.gauss_newton.draws import Pulled, sum_of
from flatjax.layers.kernels import Layer
from flatjax.layers.reading.feature_axes import read_layer
from flatjax.layers.reading.named import check_list, named_layers
from flatjax.layers.reading.program import Program


def gauss_newton_flatness(
    outputs_fn: Callable[..., Any],
    params: Tree,
    *batch: Any,
    key: Key[Array, ""],
    layers: Sequence[str | Layer] | None = None,
    loss: str = "softmax_cross_entropy",
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    r"""Estimates Σ_l κ^GN_l, the Gauss-Newton relative flatness of layers, from one draw, to be trained with.

        g = Σ_i J_iᵀ u_i,    E u_i u_iᵀ = G_i,    E ‖W_lᵀ g_l‖_F² / N = κ^GN_l

    with J_i the derivative of the logits of sample i in the weights, and G_i the Hessian of its loss in its logits. The
    estimate is unbiased, and so is its gradient. It is never below 0, as κ of a hidden layer may be: λ > 0 is safe to
    train with. It does not depend on the labels. Train with a new key at each step, by
    `loss + strength * gauss_newton_flatness(...)`, or by `flat_reg` in an optax chain, whose penalty reaches any layer.

    Args:
        outputs_fn: `(params, *batch) -> logits (..., d)`, or `(logits, weights)` with one weight a sample. The logits
            may be `TiledLogits`, which are never made at once. Batch statistics and dropout have to be fixed in it, as
            for `layer_relative_flatness`. One function for all calls: each is compiled once.
        params: a tree of arrays.
        batch: what `outputs_fn` takes besides. Part of the batch of the loss is as valid, and cheaper. Without weights,
            samples count as `flatjax.curvature.num_samples` says, if the labels it finds are one a sample.
        key: the random key of the draw.
        layers: paths, or `Layer`s; by default all kernels and embeddings, all layers of stacks among them. Their axes
            are read off the program, as by `layer_relative_flatness`.
        loss: "softmax_cross_entropy", "squared_error" (‖z − y‖²/2) or "sigmoid_cross_entropy".
        axis_name: inside a `jax.shard_map` with replicated parameters, the axes along which the samples are split.

    Returns:
        The estimate, a scalar in the unit of the loss.

    Raises:
        TypeError: a kernel is not of a floating dtype, the key is none, or the logits are not floating.
        ValueError: no layer is named, one is named twice or does not exist, the program does not show how a kernel is
            to be read, an unknown loss, or weights that are not one a sample.

    Notes:
        The value costs what the gradient of the loss costs, and 2·m·d·min(m, d) operations a kernel (m, d). Its
        gradient is one backward pass through that. With micro-batches of equal weight, the mean of their estimates is
        one of the whole batch. Where nothing counts it is NaN.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flatjax import cross_entropy, flat_reg, gauss_newton_flatness
        >>> def logits(params, x, y):
        ...     return jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
        >>> def loss(params, x, y):
        ...     return cross_entropy(logits(params, x, y), y).mean()
        >>> keys, f32 = jax.random.split(jax.random.key(0), 3), jnp.float32
        >>> hidden, head = jax.random.normal(keys[0], (3, 8), f32), jax.random.normal(keys[1], (8, 5), f32)
        >>> params = {"hidden": {"kernel": hidden}, "head": {"kernel": head}}
        >>> x, y = jax.random.normal(keys[2], (20, 3), f32), jnp.arange(20) % 5
        >>> def penalty(params, batch):
        ...     x, y, key = batch
        ...     return gauss_newton_flatness(logits, params, x, y, key=key)
        >>> tx = optax.chain(flat_reg(0.01, penalty), optax.sgd(1e-3))
        >>> state, gradient = tx.init(params), jax.grad(loss)(params, x, y)
        >>> updates, state = tx.update(gradient, state, params, batch=(x, y, jax.random.key(1)))
        >>> bool(jnp.isfinite(updates["hidden"]["kernel"]).all())
        True

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021 (κ).
        Martens: *New Insights and Perspectives on the Natural Gradient Method*, 2020 (the Gauss-Newton matrix).
    """
    a_key(key)
    if loss not in NAMED:
        raise ValueError(f"loss is {loss!r}, wanted one of {', '.join(map(repr, NAMED))}: it is differentiated")
    check_list(layers)
    named = None if layers is None else tuple(layers)
    return _sampled(outputs_fn, params, batch, key, layers=named, loss=loss, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames=("outputs_fn", "layers", "loss", "axis_name"))
def _sampled(
    outputs_fn: Callable[..., Any],
    params: Tree,
    batch: tuple[Any, ...],
    key: Key[Array, ""],
    *,
    layers: tuple[str | Layer, ...] | None,
    loss: str,
    axis_name: str | tuple[str, ...] | None,
) -> Float[Array, ""]:
    program = Program.of(sum_of(outputs_fn), params, batch)
    read = [read_layer(program, layer) for layer in named_layers(program, params, layers)]
    pulled = Pulled(outputs_fn, params, batch, read, loss, axis_name)
    gradients = pulled.gradients(key)
    return functools.reduce(jnp.add, [jnp.sum(pulled.sizes(layer, gradients[layer.path]).value) for layer in read])
