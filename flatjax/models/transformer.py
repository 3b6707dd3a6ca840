"""A small decoder-only transformer, as grokking is studied on."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from flatjax.models.tokens import look_up


class Transformer(nnx.Module):
    """Token and learned position embeddings, `depth` blocks, and a linear head without bias.

    It has no normalisation layers, as is usual in grokking, or pre-layer normalisation (`normalise`). Tokens outside of
    the vocabulary, negative ones among them, and positions beyond the context give NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> model = Transformer(vocab_size=7, num_outputs=5, context=4, width=8, depth=2, num_heads=2, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[0, 5, 1, 6], [2, 5, 3, 6]])
        >>> model(tokens).shape, model.features(tokens).shape, model.last_features(tokens).shape
        ((2, 4, 5), (2, 4, 8), (2, 8))
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        num_outputs: int,
        context: int,
        width: int = 128,
        depth: int = 1,
        num_heads: int = 4,
        normalise: bool = False,
        rngs: nnx.Rngs,
    ):
        self.token_embedding = nnx.Embed(vocab_size, width, rngs=rngs)
        self.position_embedding = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, num_heads, normalise=normalise, rngs=rngs) for _ in range(depth)])
        self.norm = _norm(width, normalise, rngs)
        self.head = nnx.Linear(width, num_outputs, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t d"]:
        return self.head(self.features(tokens))

    def features(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t m"]:
        """The features that enter the head, at every position."""
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_features(self, tokens: Int[Array, "n t"]) -> Float[Array, "n m"]:
        """The features that enter the head at the last position; the last block works out no other."""
        *blocks, last_block = self.blocks
        x = self._embed(tokens)
        for block in blocks:
            x = block(x)
        return self.norm(last_block.last(x))[:, 0]

    def _embed(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t m"]:
        positions = look_up(self.position_embedding, jnp.arange(tokens.shape[1]))
        return look_up(self.token_embedding, tokens) + positions[None, :, :]


class Block(nnx.Module):
    """Attention, causal unless said otherwise, and a perceptron, each added to the residual stream."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        normalise: bool,
        causal: bool = True,
        activation: Callable[[Array], Array] = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        self.causal = causal
        self.activation = activation
        self.attention_norm = _norm(width, normalise, rngs)
        self.attention = nnx.MultiHeadAttention(num_heads, width, decode=False, attention_fn=_attention, rngs=rngs)
        self.perceptron_norm = _norm(width, normalise, rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: Float[Array, "n t m"]) -> Float[Array, "n t m"]:
        mask = nnx.make_causal_mask(x[..., 0]) if self.causal else None
        return self._perceptron(x + self.attention(self.attention_norm(x), mask=mask))

    def last(self, x: Float[Array, "n t m"]) -> Float[Array, "n 1 m"]:
        """The block at the last position, which attends to all of them."""
        y = self.attention_norm(x)
        return self._perceptron(x[:, -1:] + self.attention(y[:, -1:], y))

    def _perceptron(self, x: Float[Array, "n t m"]) -> Float[Array, "n t m"]:
        return x + self.down(self.activation(self.up(self.perceptron_norm(x))))


def _attention(
    query: Float[Array, "n t h k"],
    key: Float[Array, "n s h k"],
    value: Float[Array, "n s h k"],
    *,
    mask: Array | None = None,
    **options: Any,
) -> Float[Array, "n t h k"]:
    if query.dtype != jnp.float64:
        return nnx.dot_product_attention(query, key, value, mask=mask, **options)
    # Flax rounds the softmax to float32, whatever the dtype: too coarse for a second derivative in float64.
    logits = jnp.einsum("nthk,nshk->nhts", query, key) / math.sqrt(query.shape[-1])
    logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("nhts,nshk->nthk", jax.nn.softmax(logits), value)


def _norm(width: int, normalise: bool, rngs: nnx.Rngs) -> Callable[[Array], Array]:
    return nnx.LayerNorm(width, rngs=rngs) if normalise else nnx.identity
