"""A network with a head, small enough for κ by its definition.

Compiled as wholes: operation by operation takes several times as long.
"""

import jax
import jax.numpy as jnp
import numpy as np

from flatjax import relative_flatness

SIZES = (5, 7, 4)


def network(seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    inputs, hidden, outputs = SIZES
    return {
        "body": {"kernel": jnp.asarray(rng.normal(size=(inputs, hidden)), dtype), "bias": jnp.zeros(hidden, dtype)},
        "head": {
            "kernel": jnp.asarray(rng.normal(size=(hidden, outputs)), dtype),
            "bias": jnp.asarray(rng.normal(size=outputs), dtype),
        },
    }


def samples(num_samples=12, seed=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_samples, SIZES[0]))
    return jnp.asarray(x, dtype), jnp.asarray(np.arange(num_samples) % SIZES[-1], jnp.int32)


@jax.jit
def features(params, x):
    return jnp.tanh(x @ params["body"]["kernel"] + params["body"]["bias"][None])


def head_loss(head, feats, labels):
    logits = feats @ head["kernel"] + head["bias"][None]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(len(labels)), labels])


@jax.jit
def loss(params, batch):
    x, labels = batch
    return head_loss(params["head"], features(params, x), labels)


@jax.jit
def penalty(params, batch):
    x, labels = batch
    return relative_flatness(params["head"], features(params, x), labels)


@jax.jit
def dense_kappa(head, feats, labels):
    """κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr H_{s,s'}, of the whole Hessian."""
    kernel = head["kernel"]
    hessian = jax.hessian(lambda kernel: head_loss(head | {"kernel": kernel}, feats, labels))(kernel)
    return jnp.sum((kernel.T @ kernel) * jnp.einsum("fsft->st", hessian))


@jax.jit
def dense_penalty(params, batch):
    x, labels = batch
    return dense_kappa(params["head"], features(params, x), labels)


def some_updates(params, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)


def added(updates, rate, gradient):
    return jax.tree.map(lambda update, each: update + rate * each, updates, gradient)


def assert_trees_close(got, want, rtol=1e-9):
    """To a share of the largest entry."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(np.max(np.abs(b))) + 1e-300)
