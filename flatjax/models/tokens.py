"""Look tokens up in an embedding, where an index beyond it must not pass for another one."""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Integer

from flatjax.core.arrays import as_arrays
from flatjax.samples import widened


def look_up(
    embedding: nnx.Embed, tokens: Integer[Array, "*n"], out_sharding: NamedSharding | None = None
) -> Float[Array, "*n m"]:
    """Looks up the rows of tokens, NaN for those outside of the vocabulary: Flax counts negative ones from its end."""
    tokens = widened(jnp.asarray(as_arrays("tokens", tokens, are_classes=True)))
    is_token = (tokens >= 0) & (tokens < embedding.num_embeddings)
    rows = embedding(jnp.where(is_token, tokens, 0), out_sharding=out_sharding)
    return jnp.where(is_token[..., None], rows, jnp.nan)
