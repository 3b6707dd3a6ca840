"""Losses that use a kernel in every way that is followed, and how each is to be read."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from flatjax.layers.kernels import Layer

from .cases import Case, cross_entropy

PATH = "body/kernel"


class Used(NamedTuple):
    """A loss, the shape of the kernel at `PATH`, and the layer that the loss makes of it."""

    loss_fn: Callable[..., Any]
    shape: tuple[int, ...]
    feature_axes: tuple[int, ...]
    stack_axes: tuple[int, ...] = ()
    has_outputs: bool = True
    """Whether it enters the loss by one product of matrices, or each layer of a stack does."""

    @property
    def layer(self) -> Layer:
        return Layer(PATH, self.feature_axes, self.stack_axes)

    def case(self, features: int = 3) -> Case:
        rng = np.random.default_rng(0)
        params = {
            "body": {"kernel": jnp.asarray(rng.normal(size=self.shape) / 2)},
            "head": {"kernel": jnp.asarray(rng.normal(size=(features, 4)))},
            "other": {"kernel": jnp.asarray(rng.normal(size=(3, 3)))},
            "scale": jnp.asarray(rng.uniform(1, 2, size=(3,))),
        }
        batch = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.integers(0, 4, 5))
        return Case(self.loss_fn, params, batch)


def of(network: Callable[..., Any]) -> Callable[..., Any]:
    """The loss of a network `(kernel, x, params) -> features`, with a head."""

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        feats = network(params["body"]["kernel"], x, params)
        return cross_entropy(feats.reshape(len(x), -1) @ params["head"]["kernel"], y)

    return loss


def indexed(W, x, _):
    for i in range(len(W)):
        x = jnp.tanh(x @ W[i])
    return x


def unstacked(W, x, _):
    for w in jnp.unstack(W, axis=1):
        x = jnp.tanh(x @ w)
    return x


def split(W, x, _):
    for w in jnp.split(W, len(W)):
        x = jnp.tanh(x @ w[0])
    return x


def scanned(W, x, _):
    return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, W)[0]


def scanned_backwards(W, x, _):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, W, reverse=True)[0]


def scanned_along_the_second_axis(W, x, _):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.moveaxis(W, 1, 0))[0]


def scanned_twice(W, x, _):
    def outer(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)

    return jax.lax.scan(outer, x, W)[0]


def scanned_by_index(W, x, _):
    return jax.lax.scan(lambda x, i: (jnp.tanh(x @ W[i]), None), x, jnp.arange(len(W)))[0]


def looped(W, x, _):
    return jax.lax.fori_loop(0, len(W), lambda i, x: jnp.tanh(x @ W[i]), x)


def carried(W, x, _):
    def step(i, state):
        x, W = state
        return jnp.tanh(x @ jax.lax.dynamic_index_in_dim(W, i, keepdims=False)), W

    return jax.lax.fori_loop(0, len(W), step, (x, W))[0]


def routed(W, x, _):
    return jnp.tanh(jnp.einsum("ni,nij->nj", x, W[jnp.arange(len(x)) % len(W)]))


def switched(W, x, _):
    def of_sample(x, i):
        return jax.lax.switch(i, [lambda x: x @ W[0], lambda x: jnp.tanh(x @ W[1])], x)

    return jnp.stack([of_sample(x[i], i % 2) for i in range(len(x))])


def of_experts(W, x, _):
    of_expert = jnp.tanh(jnp.einsum("eni,eij->enj", jnp.stack([x, x**2]), W))
    return of_expert.sum(axis=0)


def ragged(W, x, _):
    return jnp.tanh(jax.lax.ragged_dot(x, W, jnp.asarray([2, 3], jnp.int32)))


def ensemble(W, x, _):
    inputs = jnp.stack([x, 2 * x])
    return jax.vmap(lambda w, x: jnp.tanh(x @ w))(W, inputs).mean(axis=0)


def ensemble_of_convolutions(W, x, _):
    conv = nn.Conv(3, (2,), use_bias=False, padding="VALID")
    of_member = jax.vmap(lambda w, x: jnp.tanh(conv.apply({"params": {"kernel": w}}, x[:, :, None])).sum(axis=1))
    return of_member(W, jnp.stack([x, 2 * x])).mean(axis=0)


def projected_twice(W, x, _):
    x = jnp.concatenate([x, x[:, :1] ** 2], axis=1)
    for _ in range(2):
        x = jnp.tanh(jnp.tensordot(x, W, 1).reshape(len(x), -1))
    return x[:, :3]


def transposed_convolution(W, x, _):
    conv = nn.ConvTranspose(3, (2,), transpose_kernel=True, use_bias=False, padding="VALID")
    return jnp.tanh(conv.apply({"params": {"kernel": W}}, x.reshape(len(x), 3, 1))).sum(axis=1)


def convolution(groups: int, dilation: int = 1, channels: int = 4, outputs: int = 6):
    conv = nn.Conv(outputs, (2,), feature_group_count=groups, kernel_dilation=dilation, use_bias=False)

    def network(W, x, _):
        x = jnp.stack([x**power for power in range(1, channels + 1)], axis=-1)
        out = jnp.tanh(conv.apply({"params": {"kernel": W}}, x))
        return out.sum(axis=1).reshape(len(x), 3, -1).sum(axis=2)

    return network


def general(W, x, _):
    return jnp.tanh(jnp.einsum("ni,ihk->nhk", x, W)).reshape(len(x), -1)[:, :3]


def out_projection(W, x, _):
    heads = jnp.stack([x, x**2], axis=1)
    return jnp.tanh(jnp.einsum("nhi,hij->nj", heads, W))


def out_in(W, x, _):
    return jnp.tanh(x @ W.T)


def fused(W, x, _):
    q, k, v = jnp.split(x @ W, 3, axis=1)
    return jnp.tanh(q * k) + v


def fused_by_kernel(W, x, _):
    return jnp.tanh(x @ W[:, :3]) * (x @ W[:, 3:])


def put_together(W, x, params):
    return jnp.tanh(x @ jnp.concatenate([W, params["other"]["kernel"]], axis=1))[:, 1:4]


def low_rank_in(W, x, params):
    return jnp.tanh(x @ params["other"]["kernel"] + (x @ W) @ params["other"]["kernel"][:2])


def merged_in(W, x, params):
    return jnp.tanh(x @ (params["other"]["kernel"] + W @ params["other"]["kernel"][:2]))


def merged_out(W, x, params):
    return jnp.tanh(x @ (params["other"]["kernel"] + params["other"]["kernel"][:, :2] @ W))


def weight_normalised(W, x, params):
    return jnp.tanh(x @ (params["scale"][None, :] * W / jnp.linalg.norm(W, axis=0, keepdims=True)))


def masked(W, x, _):
    return jnp.tanh(x @ jnp.where(jnp.eye(3, dtype=bool), 0, W))


def summed(W, x, _):
    return jnp.tanh((x[:, :, None] * W[None]).sum(axis=1))


def modulated(W, x, _):
    return jnp.tanh(jnp.einsum("ni,nij->nj", x, W[None] * (1 + x[:, :, None] ** 2)))


def in_calls(W, x, _):
    cast = jax.jit(lambda W: jnp.transpose(W).astype(jnp.float64))
    return jnp.tanh(jax.jit(lambda w, x: jnp.einsum("ji,ni->nj", w, x))(cast(W), x))


USES = {
    "indexed": Used(of(indexed), (3, 3, 3), (1,), (0,)),
    "unstacked": Used(of(unstacked), (3, 2, 3), (0,), (1,)),
    "split": Used(of(split), (2, 3, 3), (1,), (0,)),
    "scanned": Used(of(scanned), (3, 3, 3), (1,), (0,)),
    "scanned backwards": Used(of(scanned_backwards), (2, 3, 3), (1,), (0,)),
    "scanned along the second axis": Used(of(scanned_along_the_second_axis), (3, 2, 3), (0,), (1,)),
    "scanned twice": Used(of(scanned_twice), (2, 2, 3, 3), (2,), (0, 1)),
    "scanned by index": Used(of(scanned_by_index), (2, 3, 3), (1,), (0,), has_outputs=False),
    "looped": Used(of(looped), (2, 3, 3), (1,), (0,), has_outputs=False),
    "carried": Used(of(carried), (2, 3, 3), (1,), (0,), has_outputs=False),
    "routed": Used(of(routed), (2, 3, 3), (1,), (0,)),
    "switched": Used(of(switched), (2, 3, 3), (1,), (0,), has_outputs=False),
    "experts": Used(of(of_experts), (2, 3, 3), (1,), (0,)),
    "ragged": Used(of(ragged), (2, 3, 3), (1,), (0,)),
    "ensemble": Used(of(ensemble), (2, 3, 3), (1,), (0,)),
    "ensemble of convolutions": Used(of(ensemble_of_convolutions), (2, 2, 1, 3), (1, 2), (0,), has_outputs=False),
    "projected twice": Used(of(projected_twice), (4, 2, 2), (0,), has_outputs=False),
    "transposed convolution": Used(of(transposed_convolution), (2, 3, 1), (0, 2), has_outputs=False),
    "grouped": Used(of(convolution(2)), (2, 2, 6), (0, 1), has_outputs=False),
    "depthwise": Used(of(convolution(3, channels=3)), (2, 1, 6), (0, 1), has_outputs=False),
    "dilated": Used(of(convolution(1, 2, channels=2, outputs=3)), (2, 2, 3), (0, 1), has_outputs=False),
    "general": Used(of(general), (3, 2, 2), (0,)),
    "out projection": Used(of(out_projection), (2, 3, 3), (0, 1)),
    "out, in": Used(of(out_in), (3, 3), (1,)),
    "fused": Used(of(fused), (3, 9), (0,)),
    "fused by kernel": Used(of(fused_by_kernel), (3, 6), (0,), has_outputs=False),
    "put together": Used(of(put_together), (3, 2), (0,), has_outputs=False),
    "low rank, in": Used(of(low_rank_in), (3, 2), (0,)),
    "low rank, in, merged": Used(of(merged_in), (3, 2), (0,), has_outputs=False),
    "low rank, out, merged": Used(of(merged_out), (2, 3), (0,), has_outputs=False),
    "weight normalised": Used(of(weight_normalised), (3, 3), (0,), has_outputs=False),
    "masked": Used(of(masked), (3, 3), (0,), has_outputs=False),
    "summed": Used(of(summed), (3, 3), (0,), has_outputs=False),
    "modulated": Used(of(modulated), (3, 3), (0,), has_outputs=False),
    "in calls": Used(of(in_calls), (3, 3), (0,)),
}


# Networks of Flax that keep their blocks in one stack.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(nn.Dense(3, name="up", param_dtype=jnp.float64)(x)), None


def linen_stack(axis: int) -> tuple[Callable[..., Any], Any]:
    blocks = nn.scan(Block, variable_axes={"params": axis}, split_rngs={"params": True}, length=2)()
    shapes = jax.eval_shape(blocks.init, jax.random.key(0), jnp.ones((1, 3)), None)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2), shapes)

    def loss(params, x, y):
        x, _ = blocks.apply({"params": params}, x, None)
        return cross_entropy(x, y)

    return loss, params


def nnx_stack() -> tuple[Callable[..., Any], Any]:
    class Up(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return x + nnx.tanh(self.up(x))

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Up(rngs)

    graphdef, params = nnx.split(make(nnx.Rngs(0)), nnx.Param)

    def loss(params, x, y):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        return cross_entropy(forward(nnx.merge(graphdef, params), x), y)

    return loss, params
