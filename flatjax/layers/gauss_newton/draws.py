"""Pull random cotangents of the logits back to all kernels at once, and measure what arrives at each."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.core.sharding import axis_names, sum_over_devices, varying_axes
from flatjax.core.trees import Tree, leaves_by_path, with_leaves
from flatjax.core.units import safe_sqrt, unit_near
from flatjax.curvature.counts import sample_weights
from flatjax.heads import linear_head
from flatjax.layers.gauss_newton.cotangents import Loss, cotangents
from flatjax.layers.gauss_newton.tiled_logits import TiledLogits, cotangent_of
from flatjax.layers.kernels import Layer


class Sizes(NamedTuple):
    """What one draw says of each layer of a stack, or of one layer."""

    value: Float[Array, "*k l"]
    """The draw of κ^GN, ‖Wᵀg‖²/N."""
    simplified: Float[Array, "*k l"]
    """The draw of κ̂^GN, ‖W‖² ‖g‖²/N."""
    trace: Float[Array, "*k l"]
    """The draw of the trace of the Gauss-Newton matrix, ‖g‖²/N."""


class Pulled:
    """The logits of a batch as a function of kernels, linearised where it is made."""

    def __init__(
        self,
        outputs_fn: Callable[..., Any],
        params: Tree,
        batch: tuple[Any, ...],
        layers: Sequence[Layer],
        loss: Loss,
        axis_name: str | tuple[str, ...] | None = None,
    ):
        leaves = leaves_by_path(params)
        self.kernels = {layer.path: leaves[layer.path] for layer in layers}
        self.batch, self.loss = batch, loss

        def outputs(kernels: dict[str, Array]) -> tuple[Any, Array]:
            return split_outputs(outputs_fn(with_leaves(params, kernels, tuple(kernels)), *batch), batch, loss)

        self.outputs, self._pull, weights = jax.vjp(outputs, self.kernels, has_aux=True)
        self.axis_names = _checked_axes(axis_name, self.outputs, self.kernels)
        self.total_weight = sum_over_devices(jnp.sum(weights), self.axis_names)
        self.shares = weights / self.total_weight

    def gradients(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Draws g = Σ_i √ω_i J_iᵀ u_i of each kernel, divided by √Σω."""
        if self.axis_names:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis_names))
        if isinstance(self.outputs, TiledLogits):
            if self.loss != "softmax_cross_entropy":
                raise ValueError(f"loss is {self.loss!r}, but logits in tiles have 'softmax_cross_entropy'")
            return self._pull(cotangent_of(self.outputs, self.shares, key))[0]
        # Whatever padding holds, its u is 0, and so is what u is derived by.
        counts = (self.shares != 0)[..., None]
        u = cotangents(self.loss, jnp.where(counts, self.outputs, 0), self.batch, key)
        u = jnp.where(counts, u * safe_sqrt(self.shares).astype(u.dtype)[..., None], 0)
        # In half precision what is small would be 0: it is pulled back in a unit of its own size, one for all devices.
        largest = jax.lax.stop_gradient(jnp.max(jnp.abs(u)))
        unit = unit_near(jax.lax.pmax(largest, self.axis_names) if self.axis_names else largest)
        pulled = self._pull((u / unit).astype(self.outputs.dtype))[0]
        return jax.tree.map(lambda g: unit.astype(computing_dtype(g)) * g.astype(computing_dtype(g)), pulled)

    def sizes(self, layer: Layer, gradient: Array, gram: Float[Array, "l d d"] | None = None) -> Sizes:
        """Measures the gradient of a kernel; `gram` is what `gram_of` made of the kernel, if it is at hand."""
        W, unit_of_W = _in_units(layer, self.kernels[layer.path])
        g, unit_of_g = _in_units(layer, gradient)
        if _is_wide(W):
            value = jnp.sum((_gram(W) if gram is None else gram) * _gram(g), axis=(1, 2))
        else:
            value = jnp.sum(jnp.einsum("lmd,lnd->lmn", W, g, precision="highest") ** 2, axis=(1, 2))
        norm_of_W, norm_of_g = (jnp.sum(x**2, axis=(1, 2)) for x in (W, g))
        unit = unit_of_W * unit_of_g
        return Sizes(value * unit * unit, norm_of_W * norm_of_g * unit * unit, norm_of_g * unit_of_g * unit_of_g)


def gram_of(layer: Layer, kernel: Array) -> Float[Array, "l d d"] | None:
    """W Wᵀ of each layer of a stack, in its unit, or None where there are no more features than outputs."""
    W, _ = _in_units(layer, kernel)
    return _gram(W) if _is_wide(W) else None


def _checked_axes(axis_name: str | tuple[str, ...] | None, outputs: Any, kernels: Any) -> tuple[str, ...]:
    """The axes that split the samples.

    Raises:
        ValueError: they are not the ones along which the logits vary from device to device, or kernels vary.
    """
    names = axis_names(axis_name)
    varying, of_kernels = varying_axes(outputs), varying_axes(kernels)
    if set(names) != varying or of_kernels:
        raise ValueError(
            f"axis_name is {axis_name!r}, but the logits vary along the axes {sorted(varying)} and the kernels along "
            f"{sorted(of_kernels)}: inside jax.shard_map, with its default check_vma=True, name the axes that split "
            "the samples, and replicate the parameters; outside, leave axis_name out"
        )
    return names


def split_outputs(outputs: Any, batch: tuple[Any, ...], loss: Loss) -> tuple[Any, Float[Array, "..."]]:
    """Splits what `outputs_fn` returns into logits and weights.

    Where there are only logits, the weights are those that the batch shows, if its loss is one of classes.

    Raises:
        TypeError: the logits are not floating.
        ValueError: the weights are not one a sample.
    """
    is_pair = isinstance(outputs, tuple) and not isinstance(outputs, TiledLogits)
    logits, weights = outputs if is_pair else (outputs, None)
    array = logits.feats if isinstance(logits, TiledLogits) else logits
    if not isinstance(array, jax.Array) or not jnp.issubdtype(array.dtype, jnp.floating) or array.ndim < 1:
        got = f"dtype {array.dtype} and shape {array.shape}" if hasattr(array, "dtype") else f"a {type(array).__name__}"
        raise TypeError(f"outputs_fn returns {got}, wanted logits (..., d), or (logits, weights)")
    samples, dtype = logits.shape[:-1], computing_dtype(array)
    if weights is None and loss == "softmax_cross_entropy":
        weights = sample_weights(batch, samples)
    weights = jnp.ones(samples, dtype) if weights is None else jnp.asarray(weights)
    if weights.shape != samples:
        raise ValueError(f"outputs_fn returns weights {weights.shape} for logits {logits.shape}, wanted {samples}")
    weights = weights.astype(dtype)
    # What is no weight may not look like one once it is divided by the sum.
    return logits, jnp.where(weights >= 0, weights, jnp.nan)


def sum_of(outputs_fn: Callable[..., Any]) -> Callable[..., Float[Array, ""]]:
    """The sum of all logits, a scalar whose program shows how each kernel is used."""

    def total(params: Tree, *batch: Any) -> Float[Array, ""]:
        logits, _ = split_outputs(outputs_fn(params, *batch), batch, "softmax_cross_entropy")
        if isinstance(logits, TiledLogits):
            logits = linear_head(logits.head).logits(logits.feats.reshape(-1, logits.feats.shape[-1]))
        return jnp.sum(logits.astype(computing_dtype(logits)))

    return total


def _in_units(layer: Layer, kernel: Array) -> tuple[Float[Array, "l m d"], Float[Array, " l"]]:
    """The matrix Wᵀ of each layer of a stack, and the unit that it is in, in which its square can be taken."""
    matrices = layer.matrices(kernel).astype(computing_dtype(kernel))
    unit = unit_near(jnp.max(jnp.abs(matrices), axis=(1, 2)))
    return matrices / unit[:, None, None], unit


def _is_wide(matrices: Float[Array, "l m d"]) -> bool:
    return matrices.shape[2] < matrices.shape[1]


def _gram(matrices: Float[Array, "l m d"]) -> Float[Array, "l d d"]:
    return jnp.einsum("lmc,lmd->lcd", matrices, matrices, precision="highest")
