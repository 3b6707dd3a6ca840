"""The relative flatness of several layers at once, estimated by one random direction, to train with."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.arrays import a_key
from flatjax.core.dtypes import computing_dtype
from flatjax.core.trees import Tree, leaves_by_path, with_leaves
from flatjax.curvature.vectors import random_signs
from flatjax.layers.kernels import Layer, paths_of
from flatjax.layers.reading.feature_axes import read_layer
from flatjax.layers.reading.named import check_list
from flatjax.layers.reading.program import Program


def sampled_flatness(
    loss_fn: Callable[..., Any], params: Tree, *batch: Any, layers: Sequence[str | Layer], key: Key[Array, ""]
) -> Float[Array, ""]:
    r"""Estimates Σ_l κ_l of some layers from one random direction, cheaply enough to be trained with.

        v = (W_l A_l)_l,    ⟨v, H v⟩ = d²/dt² L(W + t v) at t = 0,    E_A ⟨v, H v⟩ = Σ_l κ_l

    The entries of every A_l are independent signs, so that the estimate is unbiased, and so is its gradient. Train with
    it as with any term of a loss, and with a new key at each step: `loss + strength * sampled_flatness(...)`, or by
    `flat_reg` in an optax chain, whose penalty reaches any layer. To measure rather than to train, take
    `flatness_profile`, which gives each layer with its standard error.

    Notes:
        By XLA's count of operations, for a perceptron of six hidden layers, one call costs 3.0 times the loss for the
        first layer and 4.4 times for all six. The gradient costs 3.8 and 5.8 times that of the loss. For a head it is
        1.2 and 1.3 times. Two forward derivatives are taken, not a Hessian-vector product: differentiated once more
        that takes a third to a half longer. A stack counts as all of its layers. Batch statistics and dropout have to
        be fixed in the loss, as for `layer_relative_flatness`.

    Args:
        loss_fn: `(params, *batch) -> scalar`, three times differentiable. Use one function for all calls: each is
            compiled once.
        params: a tree of arrays.
        batch: what the loss takes besides.
        layers: the paths of kernels, as "blocks/0/up/kernel", or a `Layer` of each, as for `layer_relative_flatness`.
        key: the random key of the direction.

    Returns:
        The estimate, a scalar in the unit of the loss. It may be negative, as κ of a hidden layer may be.

    Raises:
        TypeError: a kernel is not of a floating dtype, the key is none, or the loss no scalar.
        ValueError: no layer is named, one is named twice or does not exist, or the program does not show how a kernel
            is to be read.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flatjax import cross_entropy, flat_reg, sampled_flatness
        >>> def loss(params, x, y):
        ...     return cross_entropy(jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"], y).mean()
        >>> keys, f32 = jax.random.split(jax.random.key(0), 3), jnp.float32
        >>> hidden, head = jax.random.normal(keys[0], (3, 8), f32), jax.random.normal(keys[1], (8, 5), f32)
        >>> params = {"hidden": {"kernel": hidden}, "head": {"kernel": head}}
        >>> x, y = jax.random.normal(keys[2], (20, 3), f32), jnp.arange(20) % 5
        >>> def penalty(params, batch):
        ...     x, y, key = batch
        ...     return sampled_flatness(loss, params, x, y, layers=["hidden/kernel"], key=key)
        >>> tx = optax.chain(flat_reg(0.01, penalty), optax.sgd(1e-3))
        >>> state, gradient = tx.init(params), jax.grad(loss)(params, x, y)
        >>> updates, state = tx.update(gradient, state, params, batch=(x, y, jax.random.key(1)))
        >>> bool(jnp.isfinite(updates["hidden"]["kernel"]).all())
        True

    References:
        Hutchinson: *A Stochastic Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines*, 1990.
    """
    a_key(key)
    check_list(layers)
    paths_of(params, layers)
    return _sampled(loss_fn, params, batch, key, layers=tuple(layers))


@functools.partial(jax.jit, static_argnames=("loss_fn", "layers"))
def _sampled(
    loss_fn: Callable[..., Any],
    params: Tree,
    batch: tuple[Any, ...],
    key: Key[Array, ""],
    *,
    layers: tuple[str | Layer, ...],
) -> Float[Array, ""]:
    program, leaves = Program.of(loss_fn, params, batch), leaves_by_path(params)
    read = [read_layer(program, layer) for layer in layers]
    kernels = {layer.path: leaves[layer.path] for layer in read}
    direction = {
        layer.path: _direction(layer, kernels[layer.path], jax.random.fold_in(key, i)) for i, layer in enumerate(read)
    }

    def loss(kernels: dict[str, Array]) -> Array:
        return loss_fn(with_leaves(params, kernels, tuple(kernels)), *batch)

    def slope(kernels: dict[str, Array]) -> Array:
        return jax.jvp(loss, (kernels,), (direction,))[1]

    return jax.jvp(slope, (kernels,), (direction,))[1]


def _direction(layer: Layer, kernel: Array, key: Key[Array, ""]) -> Array:
    """W A with random signs A, for each layer of a stack. It is differentiated with the kernel."""
    matrices = layer.matrices(kernel)
    number, size, _ = matrices.shape
    dtype = computing_dtype(matrices)
    signs = random_signs(key, (number, size, size), dtype)
    drawn = jnp.matmul(signs, matrices.astype(dtype), precision="highest")
    return layer.kernel(drawn, kernel.shape).astype(kernel.dtype)
