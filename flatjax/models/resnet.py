"""The residual network of 18 layers, for images of any size."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class ResNet18(nnx.Module):
    """Four stages of two basic blocks, each stage twice as wide and half as fine as the last, pooled over the image.

    The features are the mean over the positions of the last block's output, 8 · `width` of them, and the head is linear
    with bias. Where a block changes the shape, its shortcut is a 1 × 1 convolution; convolutions have no bias and are
    followed by batch normalisation. With `width` 64, the 7 × 7 stem and 1000 outputs it has 11,689,512 parameters.

    Batch normalisation is one of two functions of the parameters:

    * After `model.eval()` the running statistics are constants, held fixed by every derivative, and samples do not
      interact. They lie in `rest`, not in the parameters.
    * After `model.train()`, as a new model is, the batch's own mean and variance are part of the function. Samples
      interact, so that the loss of a data set is not the mean over its batches; a Hessian goes through the statistics;
      and a convolution's kernel can be scaled without effect. Merge with `nnx.merge(graphdef, params, rest, copy=True)`
      then: the running statistics are renewed in the merged model, which else shares them with `rest`. To keep them,
      return the merged model's.

    Which of the two is recorded in `graphdef`, so call them before `nnx.split`. Where ReLU or the maximum has a kink,
    derivatives are those of one side. In parameters of bfloat16 the statistics stay float32, and so do the layers'
    outputs.

    Args:
        num_outputs: the number of outputs of the head.
        channels_in: the number of channels of the images.
        width: the number of channels of the first stage.
        stem: "3x3" leaves the image's size, for 32 × 32 images; "7x7" with a maximum pool quarters it, for 224 × 224.

    Raises:
        ValueError: an unknown stem.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> from flatjax.curvature.products import Hessian, product
        >>> model = ResNet18(3, width=2, rngs=nnx.Rngs(0))
        >>> model.eval()
        >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        >>> def loss(params, images, labels):
        ...     logits = nnx.merge(graphdef, params, rest)(images)
        ...     return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        >>> images, labels = jax.random.normal(jax.random.key(0), (4, 4, 4, 3), jnp.float32), jnp.array([0, 1, 2, 0])
        >>> hessian = Hessian(loss, params, (images, labels), leaves=("head/kernel",))  # of all leaves without `leaves`
        >>> product(hessian, {"head/kernel": params["head"]["kernel"][...]})["head/kernel"].shape
        (16, 3)

    References:
        He, Zhang, Ren, Sun: *Deep Residual Learning for Image Recognition*, CVPR 2016.
        Ioffe, Szegedy: *Batch Normalization*, ICML 2015.
    """

    def __init__(
        self,
        num_outputs: int,
        *,
        channels_in: int = 3,
        width: int = 64,
        stem: Literal["3x3", "7x7"] = "3x3",
        rngs: nnx.Rngs,
    ):
        if stem not in ("3x3", "7x7"):
            raise ValueError(f"stem is {stem!r}, wanted '3x3' or '7x7'")
        self.pool = stem == "7x7"
        size, stride = (7, 2) if stem == "7x7" else (3, 1)
        self.stem = _convolution(channels_in, width, size, stride, rngs)
        self.stem_norm = _batch_norm(width, rngs=rngs)
        blocks, channels = [], width
        for channels_out in (width, 2 * width, 4 * width, 8 * width):
            stride = 1 if channels_out == channels else 2
            blocks.append(BasicBlock(channels, channels_out, stride=stride, rngs=rngs))
            blocks.append(BasicBlock(channels_out, channels_out, stride=1, rngs=rngs))
            channels = channels_out
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(channels, num_outputs, rngs=rngs)

    def __call__(self, images: Float[Array, "n h w c"]) -> Float[Array, "n d"]:
        return self.head(self.features(images))

    def features(self, images: Float[Array, "n h w c"]) -> Float[Array, "n m"]:
        """The features that enter the head."""
        x = jax.nn.relu(self.stem_norm(self.stem(images)))
        if self.pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return jnp.mean(x, axis=(1, 2))


class BasicBlock(nnx.Module):
    """Two 3 × 3 convolutions, added to a shortcut before the last ReLU."""

    def __init__(self, channels_in: int, channels_out: int, *, stride: int, rngs: nnx.Rngs):
        self.first = _convolution(channels_in, channels_out, 3, stride, rngs)
        self.first_norm = _batch_norm(channels_out, rngs=rngs)
        self.second = _convolution(channels_out, channels_out, 3, 1, rngs)
        self.second_norm = _batch_norm(channels_out, rngs=rngs)
        same_shape = channels_in == channels_out and stride == 1
        self.shortcut = nnx.identity if same_shape else _convolution(channels_in, channels_out, 1, stride, rngs)
        self.shortcut_norm = nnx.identity if same_shape else _batch_norm(channels_out, rngs=rngs)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c2"]:
        y = jax.nn.relu(self.first_norm(self.first(x)))
        y = self.second_norm(self.second(y))
        return jax.nn.relu(y + self.shortcut_norm(self.shortcut(x)))


def _convolution(channels_in: int, channels_out: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        channels_in,
        channels_out,
        (size, size),
        strides=stride,
        padding=size // 2,  # "SAME" pads an even image on one side alone if the stride is 2
        use_bias=False,
        kernel_init=jax.nn.initializers.he_normal(),
        rngs=rngs,
    )


# The fast variance is a difference E[x²] − E[x]², which cancels.
_batch_norm = functools.partial(nnx.BatchNorm, momentum=0.9, use_fast_variance=False)
