"""A decoder-only language model that by its configuration is GPT-2, GPT-NeoX, Llama, Qwen-2 or Qwen-3."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flatjax.heads import HeadParams
from flatjax.models.decoder.config import DecoderConfig
from flatjax.models.decoder.parts import Attention, Norm, Perceptron
from flatjax.models.decoder.sharding import embedding_sharding
from flatjax.models.tokens import look_up


class Decoder(nnx.Module):
    """Token embedding, pre-norm blocks on a residual stream, a last normalisation, and a linear head.

    Tokens outside of the vocabulary, negative ones among them, give NaN.

    Args:
        config: the kind of decoder.
        dtype: the dtype that it computes in; normalisation and softmax are in float32 at least.
        param_dtype: the dtype of its parameters.
        rngs: the random keys to draw them with.

    Raises:
        ValueError: when it is called, a text longer than the positions that were learned.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from flatjax import relative_flatness
        >>> from flatjax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=11, width=8, depth=2, num_heads=4, num_key_value_heads=2)
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.array([[0, 5, 1, 6, 2], [2, 5, 3, 10, 7]])
        >>> model(tokens).shape, model.features(tokens).shape, model.stream(tokens).shape
        ((2, 5, 11), (2, 5, 8), (3, 2, 5, 8))
        >>> kappa = relative_flatness(model.head_params(), model.features(tokens)[:, :-1], tokens[:, 1:])
        >>> bool(kappa > 0)
        True

    References:
        Radford et al.: *Language Models are Unsupervised Multitask Learners*, 2019 (GPT-2).
        Biderman et al.: *Pythia*, ICML 2023 (GPT-NeoX).
        Grattafiori et al.: *The Llama 3 Herd of Models*, 2024.
        Yang et al.: *Qwen2 Technical Report*, 2024, and *Qwen3 Technical Report*, 2025.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        embedding = {"embedding_init": nnx.initializers.normal(0.02), "rngs": rngs, **dtypes}
        self.token_embedding = nnx.Embed(config.vocab_size, config.width, **embedding)
        is_learned = config.positions == "learned"
        self.position_embedding = nnx.Embed(config.context, config.width, **embedding) if is_learned else None
        self.blocks = nnx.List([DecoderBlock(config, rngs=rngs, **dtypes) for _ in range(config.depth)])
        self.norm = Norm(config.width, config.norm, config.norm_epsilon, **dtypes)
        self.head = (
            None if config.tied else nnx.Linear(config.width, config.vocab_size, use_bias=False, rngs=rngs, **dtypes)
        )

    def __call__(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t d"]:
        feats = self.features(tokens)
        return self.token_embedding.attend(feats) if self.head is None else self.head(feats)

    def features(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t m"]:
        """The features that enter the head, at every position."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def stream(self, tokens: Int[Array, "n t"]) -> Float[Array, "blocks n t m"]:
        """The residual stream before the first block and after each, before the last normalisation."""
        xs = [self.embed(tokens)]
        for block in self.blocks:
            xs.append(block(xs[-1]))
        return jnp.stack(xs)

    def embed(self, tokens: Int[Array, "n t"]) -> Float[Array, "n t m"]:
        """The residual stream before the first block."""
        sharding = embedding_sharding(tokens, self.token_embedding.embedding[...])
        x = look_up(self.token_embedding, tokens, sharding)
        if self.position_embedding is None:
            return x
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"tokens has {tokens.shape[1]} positions, wanted at most the {self.config.context} learned"
            )
        return x + self.position_embedding(jnp.arange(tokens.shape[1]))[None]

    def head_params(self) -> HeadParams:
        """The head, as `flatjax.relative_flatness` takes it: {"kernel": (m, d)}, or {"embedding".

        (d, m)} if it is tied.
        """
        return nnx.state(self.token_embedding if self.head is None else self.head, nnx.Param)


class DecoderBlock(nnx.Module):
    """Attention and a perceptron, each normalised before and added to the residual stream."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.parallel = config.parallel
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.attention_norm = Norm(config.width, config.norm, config.norm_epsilon, **dtypes)
        self.attention = Attention(config, rngs=rngs, **dtypes)
        self.perceptron_norm = Norm(config.width, config.norm, config.norm_epsilon, **dtypes)
        self.perceptron = Perceptron(config, rngs=rngs, **dtypes)

    def __call__(self, x: Float[Array, "n t m"]) -> Float[Array, "n t m"]:
        attended = x + self.attention(self.attention_norm(x))
        return attended + self.perceptron(self.perceptron_norm(x if self.parallel else attended))


@functools.lru_cache(maxsize=16)
def decoder_structure(config: DecoderConfig, dtype: Any, param_dtype: Any) -> tuple[Any, Any]:
    """The structure of `Decoder(config)`, and the shapes of its parameters: traced once for all weights that it has."""
    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0)))
    return nnx.split(abstract, nnx.Param)
