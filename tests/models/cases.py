"""Models with values drawn for all of their state, and Hessian products against differences of gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flatjax.core.trees import leaf_path


def drawn(make, dtype=np.float64, seed=0):
    """(graphdef, params, rest) of the model that `make` returns; biases and statistics, too, are not their defaults."""
    rng = np.random.default_rng(seed)

    def draw(keys, leaf):
        if leaf_path(keys).endswith(("scale", "var")):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), dtype)
        size = np.sqrt(leaf.shape[-1] / leaf.size) if leaf.ndim > 1 else 0.1
        return jnp.asarray(size * rng.normal(size=leaf.shape), dtype)

    graphdef, *states = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    return (graphdef, *(jax.tree_util.tree_map_with_path(draw, state) for state in states))


@functools.partial(jax.jit, static_argnums=0)
def outputs(graphdef, params, rest, inputs):
    """The logits and the features of a split model, compiled once a structure and shape."""
    model = nnx.merge(graphdef, params, rest, copy=True)
    return model(inputs), model.features(inputs)


def pure_loss(graphdef, rest):
    """The mean cross-entropy `(params, inputs, labels) -> scalar` of a split model."""

    def loss(params, inputs, labels):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, params, rest, copy=True)(inputs))
        return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))

    return loss


def slopes(loss):
    """Jitted `(params, vector, *batch) -> (gradient, Hessian product)`."""
    return jax.jit(lambda params, v, *batch: jax.jvp(lambda p: jax.grad(loss)(p, *batch), (params,), (v,)))


def assert_products_are_differences_of_gradients(gradient_and_product, params, *batch, rtol=1e-6):
    rng = np.random.default_rng(1)
    v = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    _, product = gradient_and_product(params, v, *batch)
    step = 1e-7  # longer ones cross a kink of a ReLU
    after, before = (
        gradient_and_product(
            jax.tree.map(lambda leaf, d, s=sign: np.asarray(leaf) + s * step * d, params, v), v, *batch
        )[0]
        for sign in (1, -1)
    )
    differences = jax.tree.map(lambda a, b: (np.asarray(a) - np.asarray(b)) / (2 * step), after, before)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(differences))
    assert np.isfinite(largest)
    for (keys, got), want in zip(
        jax.tree_util.tree_leaves_with_path(product), jax.tree.leaves(differences), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * largest, err_msg=leaf_path(keys))
    for path in ("head", "stem", "patch_embedding", "layers"):
        if path in product:
            assert np.max(np.abs(jax.tree.leaves(product[path])[-1])) > 1e3 * rtol * largest, path


def num_parameters(make):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(make), nnx.Param)))
