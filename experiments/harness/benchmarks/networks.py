"""Networks of several kinds come with losses and data to match, for what is measured of all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from flatjax import cross_entropy
from flatjax.models import MLP, Decoder, DecoderConfig, ResNet18, Transformer


class LossProblem(NamedTuple):
    """A problem is a network's logits as a pure function, its parameters, and batches of a task that it can learn."""

    outputs_fn: Callable[..., jax.Array]
    params: Any
    batches: list[tuple[jax.Array, jax.Array]]
    loss_fn: Callable[..., jax.Array]
    """The mean cross-entropy. One function for all calls, as each compiles what it is given."""

    @classmethod
    def of(cls, outputs_fn: Callable[..., jax.Array], params: Any, batches: list[Any]) -> "LossProblem":
        """Make the loss of the logits."""

        def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return cross_entropy(outputs_fn(params, x, y), y).mean()

        return cls(outputs_fn, params, batches, loss_fn)

    def trained(self, num_steps: int, learning_rate: float = 1e-3) -> "LossProblem":
        """Train the network by Adam, on the batches in turn."""
        optimizer = optax.adam(learning_rate)

        @jax.jit
        def step(params: Any, state: Any, *batch: jax.Array) -> tuple[Any, Any]:
            updates, state = optimizer.update(jax.grad(self.loss_fn)(params, *batch), state)
            return optax.apply_updates(params, updates), state

        params, state = self.params, optimizer.init(self.params)
        for i in range(num_steps):
            params, state = step(params, state, *self.batches[i % len(self.batches)])
        return self._replace(params=params)


def perceptron(seed: int = 0, *, batch_size: int = 256, num_batches: int = 2, width: int = 512) -> LossProblem:
    """Build a perceptron of four layers on handwritten digits."""
    model = MLP((64, width, width, width, 10), rngs=nnx.Rngs(seed))
    return _network(model, _digits(batch_size, num_batches, lambda images: images.reshape(len(images), -1)))


def resnet(
    seed: int = 0, *, batch_size: int = 32, num_batches: int = 2, width: int = 64, size: int = 32
) -> LossProblem:
    """Build ResNet-18 on enlarged handwritten digits; its batch statistics are untrained and held fixed."""
    model = ResNet18(10, channels_in=1, width=width, rngs=nnx.Rngs(seed))
    model.eval()
    data = _digits(
        batch_size,
        num_batches,
        lambda images: jax.image.resize(images, (len(images), size, size), "linear")[..., None],
    )
    return _network(model, data)


def transformer(
    seed: int = 0,
    *,
    depth: int = 12,
    width: int = 64,
    batch_size: int = 16,
    num_batches: int = 2,
    context: int = 32,
    vocab_size: int = 64,
) -> LossProblem:
    """Build a transformer with pre-layer normalisation, on the task to say each token again two places later."""
    model = Transformer(
        vocab_size=vocab_size, num_outputs=vocab_size, context=context, width=width, depth=depth, normalise=True,
        rngs=nnx.Rngs(seed),
    )  # fmt: skip
    return _network(model, repeated_tokens(seed, batch_size, num_batches, context, vocab_size))


def decoder(
    seed: int = 0,
    *,
    depth: int = 12,
    width: int = 64,
    batch_size: int = 16,
    num_batches: int = 2,
    context: int = 32,
    vocab_size: int = 64,
    is_stacked: bool = False,
) -> LossProblem:
    """Build a decoder on the transformer's task, its blocks one by one or as one stack that is scanned over."""
    config = DecoderConfig(vocab_size=vocab_size, width=width, depth=depth, num_heads=4, tied=False)
    model = Decoder(config, rngs=nnx.Rngs(seed))
    network = _network(model, repeated_tokens(seed, batch_size, num_batches, context, vocab_size))
    if not is_stacked:
        return network
    blocks = [nnx.state(block, nnx.Param) for block in model.blocks]
    block_graph = nnx.graphdef(model.blocks[0])
    model.blocks = nnx.List([])
    graphdef, params = nnx.split(model, nnx.Param)

    def outputs_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        outer = nnx.merge(graphdef, params["outer"])

        def forward(x: jax.Array, block: Any) -> tuple[jax.Array, None]:
            return nnx.merge(block_graph, block)(x), None

        x, _ = jax.lax.scan(forward, outer.embed(x), params["blocks"])
        return outer.norm(x) @ outer.head_params()["kernel"]

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return LossProblem.of(outputs_fn, {"outer": params, "blocks": stack}, network.batches)


def repeated_tokens(
    seed: int, batch_size: int, num_batches: int, context: int, vocab_size: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Return random tokens, and as labels each token again two places later."""
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(rng.integers(0, vocab_size, (batch_size, context))) for _ in range(num_batches)]
    return [(tokens, jnp.roll(tokens, 2, axis=1)) for tokens in drawn]


def _network(model: nnx.Module, batches: list[tuple[jax.Array, jax.Array]]) -> LossProblem:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def outputs_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest)(x)

    return LossProblem.of(outputs_fn, params, batches)


def _digits(batch_size: int, num_batches: int, shaped: Callable[[jax.Array], jax.Array]) -> list[Any]:
    images, labels = load_digits(return_X_y=True)
    images = shaped(jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32))
    labels = jnp.asarray(labels, jnp.int32)
    ends = range(batch_size, batch_size * num_batches + 1, batch_size)
    return [(images[end - batch_size : end], labels[end - batch_size : end]) for end in ends]
