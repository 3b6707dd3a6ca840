"""The vision transformer, with a linear head."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from flatjax.models.transformer import Block


class ViT(nnx.Module):
    """Patches of an image and learned positions through pre-norm transformer blocks, pooled, and a linear head.

    The features are the class token, or the mean over the patches, after the last layer normalisation. GELU is in its
    tanh form. Layer normalisation is within a sample: samples do not interact, and there is no state beside the
    parameters. By default it is ViT-Ti/16, with 5,717,416 parameters for 1000 outputs.

    Args:
        num_outputs: the number of outputs of the head.
        image_size: the height and width of the images.
        patch_size: the height and width of a patch; divides `image_size`.
        channels_in: the number of channels of the images.
        width: the width of the residual stream.
        depth: the number of blocks.
        num_heads: the number of heads of the attention; divides `width`.
        pool: "class token" or "mean".

    Raises:
        ValueError: sizes that do not divide, an unknown pool; or, when it is called, images of another shape.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> digits = dict(image_size=8, patch_size=2, channels_in=1)
        >>> model = ViT(10, **digits, width=12, depth=2, num_heads=3, rngs=nnx.Rngs(0))
        >>> images = jnp.ones((5, 8, 8, 1), jnp.float32)
        >>> model(images).shape, model.features(images).shape
        ((5, 10), (5, 12))

    References:
        Dosovitskiy et al.: *An Image is Worth 16x16 Words*, ICLR 2021.
        Touvron et al.: *Training data-efficient image transformers*, ICML 2021 (the size "tiny").
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        channels_in: int = 3,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        pool: Literal["class token", "mean"] = "class token",
        rngs: nnx.Rngs,
    ):
        if image_size % patch_size:
            raise ValueError(f"patch_size is {patch_size}, wanted a divisor of image_size, {image_size}")
        if pool not in ("class token", "mean"):
            raise ValueError(f"pool is {pool!r}, wanted 'class token' or 'mean'")
        self.image_shape = (image_size, image_size, channels_in)
        patch = (patch_size, patch_size)
        self.patch_embedding = nnx.Conv(channels_in, width, patch, strides=patch, padding="VALID", rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros(width)) if pool == "class token" else None
        num_tokens = (image_size // patch_size) ** 2 + (pool == "class token")
        self.positions = nnx.Param(jax.nn.initializers.normal(0.02)(rngs.params(), (num_tokens, width)))
        self.blocks = nnx.List(
            [
                Block(width, num_heads, normalise=True, causal=False, activation=jax.nn.gelu, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, num_outputs, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n d"]:
        return self.head(self.features(images))

    def features(self, images: Float[Array, "n h w c"]) -> Float[Array, "n m"]:
        """The features that enter the head."""
        x = self._embed(images)
        for block in self.blocks:
            x = block(x)
        if self.class_token is None:
            return jnp.mean(self.norm(x), axis=1)
        return self.norm(x[:, 0])

    def _embed(self, images: Float[Array, "n h w c"]) -> Float[Array, "n t m"]:
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images are {images.shape[1:]}, wanted (height, width, channels) = {self.image_shape}")
        x = self.patch_embedding(images)
        x = x.reshape(len(images), -1, x.shape[-1])
        if self.class_token is not None:
            token = jnp.broadcast_to(self.class_token[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
            x = jnp.concatenate([token, x], axis=1)
        return x + self.positions[...].astype(x.dtype)[None]
