"""Perturb a trained network's kernels to see how much its loss minds: by noise, or by rounding to few bits."""

import jax
import jax.numpy as jnp

from flatjax.core.trees import Tree, leaves_by_path, with_leaves
from flatjax.layers import find_layers


def with_noise(params: Tree, key: jax.Array, size: jax.Array) -> Tree:
    """Add Gaussian noise of the expected squared norm (size · ‖W‖_F)² to each kernel W."""
    leaves, changed = leaves_by_path(params), {}
    for i, path in enumerate(find_layers(params)):
        kernel = leaves[path]
        noise = jax.random.normal(jax.random.fold_in(key, i), kernel.shape, kernel.dtype)
        changed[path] = kernel + size * jnp.sqrt(jnp.mean(kernel**2)) * noise
    return with_leaves(params, changed, list(changed))


def rounded(params: Tree, bits: int) -> Tree:
    """Round each kernel to 2 · 2^(bits − 1) − 1 levels, as many below 0 as above, as far apart as each output needs.

    An embedding's rows are its outputs: they are rows of the head, where that is tied.
    """
    leaves, changed, levels = leaves_by_path(params), {}, 2 ** (bits - 1) - 1
    for path, layer in find_layers(params).items():
        kernel = leaves[path]
        axes = (1,) if path.endswith("embedding") else layer.feature_axes
        largest = jnp.max(jnp.abs(kernel), axis=axes, keepdims=True)
        step = jnp.where(largest > 0, largest, 1) / levels
        changed[path] = jnp.round(kernel / step) * step
    return with_leaves(params, changed, list(changed))
