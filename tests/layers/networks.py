"""Logits of small networks of every kind in float64, and κ^GN of their layers from dense Jacobians."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatjax import Layer
from flatjax.core.trees import leaves_by_path, with_leaves
from flatjax.layers.kernels import by_convention


class Network(NamedTuple):
    """Logits as a function of parameters and a batch, and the layers that it has."""

    outputs_fn: Callable[..., Any]
    params: Any
    batch: tuple[Any, ...]
    layers: tuple[str | Layer, ...]


def dense_kappas(network: Network, layer: str | Layer, loss: Callable[[jax.Array], jax.Array]) -> np.ndarray:
    """κ^GN, κ̂^GN and Tr GN by their definitions (3, layers); `loss` is of the logits of one sample."""
    leaves = leaves_by_path(network.params)
    found = by_convention(layer, leaves[layer].ndim) if isinstance(layer, str) else layer
    kernel = leaves[found.path]

    def outputs(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
        leaf = {found.path: found.kernel(matrices, kernel.shape)}
        got = network.outputs_fn(with_leaves(network.params, leaf, (found.path,)), *network.batch)
        logits, weights = got if isinstance(got, tuple) else (got, jnp.ones(got.shape[:-1]))
        return logits.reshape(-1, logits.shape[-1]), weights.reshape(-1)

    matrices = found.matrices(kernel)
    (logits, weights), jacobian = outputs(matrices), jax.jit(jax.jacrev(outputs))(matrices)[0]
    G = jax.jit(jax.vmap(jax.hessian(loss)))(logits)
    shares, W = np.asarray(weights / weights.sum()), np.asarray(matrices)
    traces = np.einsum("n,nalms,nab,nblmt->lst", shares, jacobian, G, jacobian, optimize=True)
    value = np.einsum("lms,lmt,lst->l", W, W, traces)
    trace = np.einsum("lss->l", traces)
    return np.stack([value, np.sum(W**2, axis=(1, 2)) * trace, trace])


def perceptron(activation: Callable[[jax.Array], jax.Array], *, weighted: bool = False) -> Network:
    rng = np.random.default_rng(0)
    params = {
        f"layer{i}": {"kernel": jnp.asarray(rng.normal(size=shape)), "bias": jnp.asarray(rng.normal(size=shape[1]))}
        for i, shape in enumerate([(3, 5), (5, 4), (4, 3)])
    }
    weights = rng.uniform(size=6)
    weights[2] = 0

    def outputs_fn(params, x, weights):
        for name in ("layer0", "layer1"):
            x = activation(x @ params[name]["kernel"] + params[name]["bias"][None])
        logits = x @ params["layer2"]["kernel"] + params["layer2"]["bias"][None]
        return (logits, weights) if weighted else logits

    batch = jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(weights)
    return Network(outputs_fn, params, batch, ("layer0/kernel", "layer1/kernel", "layer2/kernel"))


def convolution() -> Network:
    rng = np.random.default_rng(1)
    params = {
        "conv": {"kernel": jnp.asarray(rng.normal(size=(2, 2, 2, 3)))},
        "head": {"kernel": jnp.asarray(rng.normal(size=(3, 3)))},
    }

    def outputs_fn(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x).mean(axis=(1, 2)) @ params["head"]["kernel"]

    return Network(outputs_fn, params, (jnp.asarray(rng.normal(size=(3, 3, 3, 2))),), ("conv/kernel", "head/kernel"))


def attention(*, tied: bool = False) -> Network:
    """Tokens looked up, one block of attention, and a head, its own or the embedding; masked by −100."""
    rng = np.random.default_rng(2)
    shapes = {"query": (4, 2, 2), "key": (4, 2, 2), "value": (4, 2, 2)}
    params = {name: {"kernel": jnp.asarray(rng.normal(size=shape))} for name, shape in shapes.items()}
    params["tokens"] = {"embedding": jnp.asarray(rng.normal(size=(5, 4)))}
    params["out"] = {"kernel": jnp.asarray(rng.normal(size=(2, 2, 4)))}
    if not tied:
        params["head"] = {"kernel": jnp.asarray(rng.normal(size=(4, 5)))}

    def outputs_fn(params, tokens, labels):
        x = params["tokens"]["embedding"][tokens]
        q, k, v = (jnp.einsum("ntm,mhd->nhtd", x, params[name]["kernel"]) for name in ("query", "key", "value"))
        scores = jnp.einsum("nhtd,nhsd->nhts", q, k)
        scores = jnp.where(jnp.tril(jnp.ones((3, 3), bool))[None, None], scores, -1e9)
        mixed = jnp.einsum("nhts,nhsd->nthd", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("nthd,hdm->ntm", mixed, params["out"]["kernel"])
        head = params["tokens"]["embedding"].T if tied else params["head"]["kernel"]
        return x @ head, (labels != -100).astype(x.dtype)

    tokens, labels = rng.integers(0, 5, (2, 3)), rng.integers(0, 5, (2, 3))
    labels[0, 1] = -100
    last = Layer("tokens/embedding", (1,)) if tied else "head/kernel"
    layers = ("query/kernel", "value/kernel", Layer("out/kernel", (0, 1)), last)
    return Network(outputs_fn, params, (jnp.asarray(tokens), jnp.asarray(labels)), layers)


def stack() -> Network:
    rng = np.random.default_rng(3)
    params = {
        "blocks": {"kernel": jnp.asarray(rng.normal(size=(2, 3, 3)))},
        "head": {"kernel": jnp.asarray(rng.normal(size=(3, 4)))},
    }

    def outputs_fn(params, x):
        x, _ = jax.lax.scan(lambda x, kernel: (x + jnp.tanh(x @ kernel), None), x, params["blocks"]["kernel"])
        return x @ params["head"]["kernel"]

    return Network(
        outputs_fn, params, (jnp.asarray(rng.normal(size=(5, 3))),), (Layer("blocks/kernel", (1,), (0,)), "head/kernel")
    )


NETWORKS = {
    "relu": lambda: perceptron(jax.nn.relu),
    "tanh, weighted": lambda: perceptron(jnp.tanh, weighted=True),
    "convolution": convolution,
    "attention": attention,
    "tied": lambda: attention(tied=True),
    "stack": stack,
}
