"""Small networks and matrices, and their curvature by definition: dense, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from flatjax.curvature.products import GaussNewton, Hessian

WIDTHS = (3, 4, 2)


def mlp_params(widths=WIDTHS, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    names = ("hidden", "head")
    return {
        name: {"kernel": rng.normal(size=(m, d)).astype(dtype), "bias": rng.normal(size=d).astype(dtype)}
        for name, m, d in zip(names, widths, widths[1:], strict=False)
    }


def samples(n=7, widths=WIDTHS, seed=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, widths[0])).astype(dtype), rng.integers(0, widths[-1], n)


def predict(params, x, y):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"][None]


def mean_loss(logits, x, y):
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0])


def loss_fn(params, x, y):
    return mean_loss(predict(params, x, y), x, y)


def mlp_hessian(*, leaves=None, dtype=np.float64, n=7):
    return Hessian(loss_fn, mlp_params(dtype=dtype), samples(n, dtype=dtype), leaves)


def chosen_of(params, paths):
    """{path: leaf} of nested dictionaries, or all."""
    return (
        params
        if paths is None
        else {path: functools.reduce(dict.__getitem__, path.split("/"), params) for path in paths}
    )


def put_back(params, chosen, paths):
    if paths is None:
        return chosen

    def with_leaf(tree, keys, leaf):
        return tree | {keys[0]: with_leaf(tree[keys[0]], keys[1:], leaf)} if keys else leaf

    return functools.reduce(lambda tree, path: with_leaf(tree, path.split("/"), chosen[path]), paths, params)


def dense_hessian(loss, params, batch, paths=None):
    """Of the chosen leaves, ravelled."""
    flat, unravel = ravel_pytree(chosen_of(params, paths))
    return np.asarray(jax.jit(jax.hessian(lambda flat: loss(put_back(params, unravel(flat), paths), *batch)))(flat))


@functools.cache
def mlp_matrix(paths=None, n=7):
    return dense_hessian(loss_fn, mlp_params(), samples(n), paths)


def dense_gauss_newton(predict, loss, params, batch, paths=None):
    flat, unravel = ravel_pytree(chosen_of(params, paths))

    @jax.jit
    def matrix(flat):
        def outputs(flat):
            return predict(put_back(params, unravel(flat), paths), *batch)

        z, J = outputs(flat), jax.jacrev(outputs)(flat)
        J = J.reshape(z.size, -1)
        return J.T @ jax.hessian(lambda z: loss(z, *batch))(z).reshape(z.size, z.size) @ J

    return np.asarray(matrix(flat))


def mlp_gauss_newton(*, leaves=None):
    return GaussNewton(predict, mean_loss, mlp_params(), samples(), leaves)


def random_vectors(like, k=3, seed=2):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=(k, *leaf.shape)), leaf.dtype), like)


def ravelled(vectors):
    """A stack, as the rows of a matrix in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(vectors)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def quadratic_loss(params, matrix):
    flat = ravel_pytree(params)[0]
    return 0.5 * flat @ matrix @ flat


def matrix_curvature(matrix):
    """A matrix as the Hessian of a quadratic in a tree of two leaves, or one if it is of a scalar."""
    matrix = jnp.asarray(matrix)
    split = len(matrix) // 2
    shape = (split // 2, 2) if split and split % 2 == 0 else (split,)
    params = {"first": jnp.ones(shape, matrix.dtype), "second": jnp.ones(len(matrix) - split, matrix.dtype)}
    params = params if split else {"second": params["second"]}
    return Hessian(quadratic_loss, params, (matrix,))


def matrix_with(eigenvalues, seed=0, dtype=np.float64):
    """And the eigenvectors, as columns."""
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    return ((Q * np.asarray(eigenvalues)) @ Q.T).astype(dtype), Q
