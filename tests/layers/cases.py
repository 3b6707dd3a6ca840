"""Losses of small networks of every kind, and κ of their layers from the dense Hessian."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from flatjax.core.trees import leaves_by_path, with_leaves
from flatjax.layers.kernels import Layer, by_convention


class Case(NamedTuple):
    """A loss, its parameters and a batch, in float64."""

    loss_fn: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]

    def astype(self, dtype: Any) -> "Case":
        params, batch = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            (self.params, self.batch),
        )
        return Case(self.loss_fn, params, batch)


def dense_kappa(case: Case, layer: str | Layer) -> float:
    """κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr H_{s,s'} by its definition."""
    found = by_convention(layer, leaves_by_path(case.params)[layer].ndim) if isinstance(layer, str) else layer
    kernel = leaves_by_path(case.params)[found.path]
    matrix = found.matrix(kernel)

    def loss(matrix: jax.Array) -> jax.Array:
        leaves = {found.path: found.kernel(matrix[None], kernel.shape)}
        return case.loss_fn(with_leaves(case.params, leaves, (found.path,)), *case.batch)

    traces = jnp.einsum("msmt->st", jax.jit(jax.hessian(loss))(matrix))
    return float(jnp.sum((matrix.T @ matrix) * traces))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def perceptron(num_samples: int = 9, sizes: tuple[int, ...] = (3, 5, 4, 2), seed: int = 0) -> Case:
    """Plain functions of dictionaries, with tanh."""
    rng = np.random.default_rng(seed)
    params = {
        f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=shape)), "bias": jnp.asarray(rng.normal(size=shape[1]))}
        for i, shape in enumerate(itertools.pairwise(sizes))
    }
    return Case(
        perceptron_loss,
        params,
        (jnp.asarray(rng.normal(size=(num_samples, sizes[0]))), jnp.asarray(rng.integers(0, sizes[-1], num_samples))),
    )


def perceptron_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for name in sorted(params):
        if name != "layer0":
            x = jnp.tanh(x)
        x = x @ params[name]["kernel"] + params[name]["bias"][None, :]
    return cross_entropy(x, y)


class Convolutional(nn.Module):
    """Linen: two convolutions, one of them strided, and a head on the pooled features."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.tanh(nn.Conv(3, (3, 3), name="conv", param_dtype=jnp.float64)(x))
        x = nn.tanh(nn.Conv(2, (2, 2), strides=2, padding="VALID", name="strided", param_dtype=jnp.float64)(x))
        return nn.Dense(3, name="head", param_dtype=jnp.float64)(x.mean(axis=(1, 2)))


def convolutional_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return cross_entropy(Convolutional().apply({"params": params}, x), y)


def convolutional() -> Case:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 4, 4, 2)))
    params = Convolutional().init(jax.random.key(0), x)["params"]
    return Case(convolutional_loss, params, (x, jnp.asarray(rng.integers(0, 3, 4))))


class Attentive(nnx.Module):
    """NNX: embedding, attention of two heads, and the embedding again, transposed, as the head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5, 4, param_dtype=jnp.float64, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, param_dtype=jnp.float64, decode=False, rngs=rngs)
        self.up = nnx.Linear(4, 4, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(x)
        return self.embed.attend(x + nnx.tanh(self.up(x)))


_GRAPH = nnx.graphdef(Attentive(nnx.Rngs(0)))


def attentive_loss(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # which JAX's own attention needs for float64
        return cross_entropy(nnx.merge(_GRAPH, params)(tokens), labels)


def attentive() -> Case:
    rng = np.random.default_rng(2)
    params = nnx.state(Attentive(nnx.Rngs(0)), nnx.Param)
    tokens, labels = rng.integers(0, 5, (2, 3, 3))
    return Case(attentive_loss, params, (jnp.asarray(tokens), jnp.asarray(labels)))


def normalised_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """Samples interact through the mean and the variance of a batch."""
    x = x @ params["layer0"]["kernel"]
    x = (x - x.mean(axis=0)[None, :]) / jnp.sqrt(x.var(axis=0) + 0.1)[None, :]
    return cross_entropy(jnp.tanh(x) @ params["head"]["kernel"], y)


def normalised() -> Case:
    rng = np.random.default_rng(3)
    params = {"layer0": {"kernel": rng.normal(size=(3, 4))}, "head": {"kernel": rng.normal(size=(4, 3))}}
    params = jax.tree.map(jnp.asarray, params)
    return Case(normalised_loss, params, (jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.integers(0, 3, 6))))


CASES = {"perceptron": perceptron, "convolutional": convolutional, "attentive": attentive}
LAYERS = {
    "perceptron": ["layer0/kernel", "layer1/kernel", "layer2/kernel"],
    "convolutional": ["conv/kernel", "strided/kernel", "head/kernel"],
    "attentive": [
        "embed/embedding",
        Layer("embed/embedding", (1,)),
        *(f"attention/{name}/kernel" for name in ("query", "key", "value", "out")),
        "up/kernel",
    ],
}
EVERY_LAYER = [(name, layer) for name in CASES for layer in LAYERS[name]]
