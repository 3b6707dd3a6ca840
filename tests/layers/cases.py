"""Losses of small networks of every kind, and κ of their layers from the dense Hessian."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from flatjax import layer_relative_flatness
from flatjax.core.trees import leaves_by_path, with_leaves
from flatjax.layers.kernels import Layer, by_convention, find_layers


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


@functools.partial(jax.jit, static_argnames=("loss_fn", "layers", "options"))
def _measured(loss_fn, params, batch, layers, options):
    return [
        (
            dense_kappas(loss_fn, params, batch, layer),
            [layer_relative_flatness(loss_fn, params, *batch, layer=given, **dict(each)) for each in options],
        )
        for layer, given in layers
    ]


def measured(
    case: Case, layer: str | Layer, *methods: str, given: str | None = None, **options: Any
) -> tuple[Any, ...]:
    """κ of a layer by its definition, and by each method, all from one program.

    The methods may be given less of the layer than the definition is: its path.
    """
    each = tuple(tuple({"method": method, **options}.items()) for method in methods)
    ((dense, estimates),) = _measured(*case, ((layer, given or layer),), each)
    return dense, *estimates


def dense_kappa(case: Case, layer: str | Layer) -> Any:
    return measured(case, layer)[0]


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer", "num_probes"))
def _repeated(loss_fn, params, batch, keys, layer, num_probes):
    def estimate(key: jax.Array) -> Any:
        options = {"layer": layer, "key": key, "num_probes": num_probes, "method": "probes"}
        return layer_relative_flatness(loss_fn, params, *batch, **options)

    values, errors, _ = jax.lax.map(estimate, keys)
    return dense_kappas(loss_fn, params, batch, layer), values, errors


def repeated(case: Case, layer: str | Layer, num_probes: int) -> tuple[Any, Any, Any]:
    """κ of a layer by its definition, and 200 estimates of it by probes, with their errors, from one program."""
    return _repeated(*case, jax.random.split(jax.random.key(0), 200), layer, num_probes)


def dense_profile(case: Case) -> dict[str, Any]:
    """Computes κ of each layer that is found by its name, all from one program."""
    layers = find_layers(case.params)
    every = _measured(*case, tuple((layer, layer) for layer in layers.values()), ())
    return {path: dense for path, (dense, _) in zip(layers, every, strict=True)}


def dense_kappas(loss_fn: Callable[..., Any], params: Any, batch: tuple[Any, ...], layer: str | Layer) -> jax.Array:
    """κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr H_{s,s'} by its definition, of each layer of a stack from the Hessian in all."""
    kernel = leaves_by_path(params)[layer if isinstance(layer, str) else layer.path]
    found = by_convention(layer, kernel.ndim) if isinstance(layer, str) else layer
    matrices = found.matrices(kernel)

    def loss(matrices: jax.Array) -> jax.Array:
        leaves = {found.path: found.kernel(matrices, kernel.shape)}
        return loss_fn(with_leaves(params, leaves, (found.path,)), *batch)

    product = jax.linearize(jax.grad(loss), matrices)[1]
    num_layers, m, d = matrices.shape

    def row(place: jax.Array) -> jax.Array:
        """Of the Hessian, as far as a trace has part of it: entries of the same layer and feature."""
        unit = (jnp.arange(matrices.size) == place).astype(matrices.dtype)
        return product(unit.reshape(matrices.shape))[place // (m * d), place // d % m]

    traces = jax.lax.map(row, jnp.arange(matrices.size)).reshape(num_layers, m, d, d).sum(axis=1)
    return jnp.einsum("lms,lmt,lst->l", matrices, matrices, traces).reshape(found.stack_shape(kernel.shape))


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


@functools.cache
def convolutional() -> Case:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 4, 4, 2)))
    params = jax.jit(Convolutional().init)(jax.random.key(0), x)["params"]
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


_GRAPH, _PARAMS = nnx.split(Attentive(nnx.Rngs(0)), nnx.Param)


def attentive_loss(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # which JAX's own attention needs for float64
        return cross_entropy(nnx.merge(_GRAPH, params)(tokens), labels)


def attentive() -> Case:
    rng = np.random.default_rng(2)
    tokens, labels = rng.integers(0, 5, (2, 3, 3))
    return Case(attentive_loss, _PARAMS, (jnp.asarray(tokens), jnp.asarray(labels)))


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
