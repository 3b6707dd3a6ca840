"""Parts of a decoder's blocks: normalisation, attention with grouped queries, and a perceptron."""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flatjax.core.dtypes import computing_dtype
from flatjax.models.decoder.config import DecoderConfig
from flatjax.models.decoder.rotary import rotate
from flatjax.models.decoder.sharding import stream_sharding, with_whole_heads

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
        "silu": jax.nn.silu,
    }
)


class Norm(nnx.Module):
    """Layer or root-mean-square normalisation, within float32 at least: Flax's mixes dtypes, and rounds x² − x̄²."""

    def __init__(
        self,
        width: int,
        kind: str,
        epsilon: float,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.dtype, self.epsilon = dtype, epsilon
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype)) if kind == "layer" else None

    def __call__(self, x: Float[Array, "*leading m"]) -> Float[Array, "*leading m"]:
        wide = computing_dtype(self.dtype)
        y, row = x.astype(wide), (1,) * (x.ndim - 1) + (-1,)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.epsilon)
        y = y * self.scale[...].astype(wide).reshape(row)
        if self.bias is not None:
            y = y + self.bias[...].astype(wide).reshape(row)
        return y.astype(self.dtype)


class Attention(nnx.Module):
    """Causal attention; each head of keys and values is shared by a group of queries."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        width, head, dtypes = config.width, config.width_of_a_head, {"dtype": dtype, "param_dtype": param_dtype}

        def projection(num_heads: int) -> nnx.Linear:
            return nnx.Linear(width, num_heads * head, use_bias=config.query_key_value_bias, rngs=rngs, **dtypes)

        self.query = projection(config.num_heads)
        self.key = projection(config.key_value_heads)
        self.value = projection(config.key_value_heads)
        self.output = nnx.Linear(
            config.num_heads * head,
            width,
            use_bias=config.output_bias,
            kernel_init=residual_init(config),
            rngs=rngs,
            **dtypes,
        )
        normalised = config.query_key_norm
        self.query_norm = Norm(head, "rms", config.norm_epsilon, **dtypes) if normalised else None
        self.key_norm = Norm(head, "rms", config.norm_epsilon, **dtypes) if normalised else None

    def __call__(self, x: Float[Array, "n t m"]) -> Float[Array, "n t m"]:
        query, key, value = (self._heads(project(x)) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.positions == "rotary":
            query, key = rotate(query, self.config), rotate(key, self.config)
        mixed = attend(query, key, value)
        return self.output(mixed.reshape(*x.shape[:2], -1), out_sharding=stream_sharding(x))

    def _heads(self, y: Float[Array, "n t c"]) -> Float[Array, "n t h k"]:
        whole = with_whole_heads(y, self.config.key_value_heads)
        return whole.reshape(*y.shape[:2], -1, self.config.width_of_a_head)


def attend(
    query: Float[Array, "n t h k"], key: Float[Array, "n t g k"], value: Float[Array, "n t g k"]
) -> Float[Array, "n t h k"]:
    """Causal attention of query heads, h/g of them to a head of keys; the softmax is in float32 at least."""
    wide = computing_dtype(query)
    n, t, h, k = query.shape
    grouped = query.reshape(n, t, key.shape[2], -1, k)
    scores = jnp.einsum("ntgrk,nsgk->ngrts", grouped, key, preferred_element_type=wide) / math.sqrt(k)
    is_seen = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
    weights = jax.nn.softmax(jnp.where(is_seen, scores, -jnp.inf)).astype(value.dtype)
    return jnp.einsum("ngrts,nsgk->ntgrk", weights, value).reshape(n, t, h, k)


class Perceptron(nnx.Module):
    """A perceptron down(f(up x)), or gated: down(f(gate x) · up x)."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = config.activation
        width, inner = config.width, config.width_within
        linear = functools.partial(
            nnx.Linear, use_bias=config.perceptron_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.gate = linear(width, inner) if config.gated else None
        self.up = linear(width, inner)
        self.down = linear(inner, width, kernel_init=residual_init(config))

    def __call__(self, x: Float[Array, "n t m"]) -> Float[Array, "n t m"]:
        activate, up = ACTIVATIONS[self.activation], self.up(x)
        inner = activate(up) if self.gate is None else activate(self.gate(x)) * up
        return self.down(inner, out_sharding=stream_sharding(x))


def residual_init(config: DecoderConfig) -> nnx.Initializer:
    """Initialises what is added to the stream, 2 · depth times, so that it does not grow with the depth."""
    return nnx.initializers.variance_scaling(0.5 / config.depth, "fan_in", "truncated_normal")
