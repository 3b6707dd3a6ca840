"""The package is measured against the plain loss, the loss in tiles, and the published algorithm."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

Params = dict[str, jax.Array]


def cross_entropy(params: Params, feats: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the cross-entropy as a training loop does."""
    logits = feats @ params["kernel"] + params["bias"][None, :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def tiled_cross_entropy(params: Params, feats: jax.Array, labels: jax.Array, *, tile_size: int) -> jax.Array:
    """Compute only the loss, without its logits in memory: with its gradient this takes 4 products of matrices."""
    return _tiled_cross_entropy(tile_size, params, feats, labels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_cross_entropy(tile_size: int, params: Params, feats: jax.Array, labels: jax.Array) -> jax.Array:
    return _tiled_forward(tile_size, params, feats, labels)[0]


def _tiled_forward(tile_size, params, feats, labels):
    def step(carry, i):
        largest, mass, label_logit = carry
        _, columns, fresh, logits = _tile(tile_size, params, feats, i)
        new = jnp.maximum(largest, jnp.max(logits, axis=1))
        mass = mass * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[:, None]), axis=1)
        inside = jnp.clip(labels - columns[0].astype(labels.dtype), 0, tile_size - 1)
        here = (columns.astype(labels.dtype)[inside] == labels) & fresh[inside]
        label_logit = jnp.where(here, jnp.take_along_axis(logits, inside[:, None], axis=1)[:, 0], label_logit)
        return (new, mass, label_logit), None

    zeros = jnp.zeros_like(feats[:, 0])
    start = (zeros - jnp.inf, zeros, zeros)
    (largest, mass, label_logit), _ = jax.lax.scan(step, start, _tile_indices(tile_size, params))
    normalizers = largest + jnp.log(mass)
    return jnp.mean(normalizers - label_logit), (params, feats, labels, normalizers)


def _tiled_backward(tile_size, residuals, cotangent):
    params, feats, labels, normalizers = residuals

    def step(carry, i):
        d_kernel, d_bias, d_feats = carry
        kernel, columns, fresh, logits = _tile(tile_size, params, feats, i)
        one_hot = (columns.astype(labels.dtype)[None, :] == labels[:, None]) & fresh[None, :]
        d_logits = (jnp.exp(logits - normalizers[:, None]) - one_hot.astype(logits.dtype)) * (cotangent / len(feats))
        start = columns[0]
        before = jax.lax.dynamic_slice_in_dim(d_kernel, start, tile_size, 1)
        d_kernel = jax.lax.dynamic_update_slice_in_dim(d_kernel, before + (d_logits.T @ feats).T, start, 1)
        before = jax.lax.dynamic_slice_in_dim(d_bias, start, tile_size)
        d_bias = jax.lax.dynamic_update_slice_in_dim(d_bias, before + jnp.sum(d_logits, axis=0), start, 0)
        return (d_kernel, d_bias, d_feats + d_logits @ kernel.T), None

    start = jax.tree.map(jnp.zeros_like, (params["kernel"], params["bias"], feats))
    (d_kernel, d_bias, d_feats), _ = jax.lax.scan(step, start, _tile_indices(tile_size, params))
    return {"kernel": d_kernel, "bias": d_bias}, d_feats, None


_tiled_cross_entropy.defvjp(_tiled_forward, _tiled_backward)


def _tile_indices(tile_size, params):
    return jnp.arange(-(-len(params["bias"]) // tile_size), dtype=jnp.int32)


def _tile(tile_size, params, feats, i):
    """Return a tile's kernel, columns, which of them are new (a last tile overlaps the one before), and logits."""
    start = jnp.minimum(i * tile_size, len(params["bias"]) - tile_size)
    columns = start + jnp.arange(tile_size, dtype=start.dtype)
    fresh = columns >= i * tile_size
    kernel = jax.lax.dynamic_slice_in_dim(params["kernel"], start, tile_size, 1)
    bias = jax.lax.dynamic_slice_in_dim(params["bias"], start, tile_size)
    return kernel, columns, fresh, feats @ kernel + jnp.where(fresh, bias, -jnp.inf)[None, :]


def weight_by_weight(params: Params, feats: jax.Array, labels: jax.Array) -> jax.Array:
    """Run the published algorithm: a backward pass through the gradient per weight, then the traces of the row blocks.

    It is kinder than the published code in that it is compiled, and never holds the whole Hessian.
    """
    kernel, bias = params["kernel"], params["bias"]

    def gradient_entry(kernel: jax.Array, feature: jax.Array, output: jax.Array) -> jax.Array:
        return jax.grad(lambda kernel: cross_entropy({"kernel": kernel, "bias": bias}, feats, labels))(kernel)[
            feature, output
        ]

    def contribution(index: jax.Array) -> jax.Array:
        """Return what the weight w_sk adds to Σ_s' ⟨w_s, w_s'⟩ Tr H_{s,s'}: its Hessian row at feature k of all s'."""
        feature, output = jnp.divmod(index, kernel.shape[1])
        hessian_row = jax.grad(gradient_entry)(kernel, feature, output)
        return hessian_row[feature] @ (kernel.T @ kernel[:, output])

    return jnp.sum(jax.lax.map(contribution, jnp.arange(kernel.size)))
