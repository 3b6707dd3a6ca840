"""Rotary positions: pairs of a query's and a key's entries are turned by an angle in proportion to their position."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flatjax.core.dtypes import computing_dtype
from flatjax.models.decoder.config import DecoderConfig, RotaryScaling


def rotate(x: Float[Array, "n t h k"], config: DecoderConfig) -> Float[Array, "n t h k"]:
    """Turns x at the positions 0 … t − 1: pairs (j, j + r/2) of the first r entries of a head.

    References:
        Su et al.: *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021.
        Black et al.: *GPT-NeoX-20B*, 2022 (the share that is rotated).
    """
    dtype = computing_dtype(x)
    angles = jnp.arange(x.shape[1], dtype=dtype)[:, None] * jnp.asarray(frequencies(config), dtype)[None, :]
    cos, sin = (f(angles).astype(x.dtype)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    half = config.rotary_width // 2
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def frequencies(config: DecoderConfig) -> np.ndarray:
    """The frequencies in radians a position, one a pair."""
    width = config.rotary_width
    usual = config.rotary_base ** -(np.arange(0, width, 2) / width)
    return _stretched(usual, config.rotary_scaling) if isinstance(config.rotary_scaling, RotaryScaling) else usual


def _stretched(usual: np.ndarray, scaling: RotaryScaling) -> np.ndarray:
    turns = scaling.context * usual / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return usual * (kept + (1 - kept) / scaling.factor)
