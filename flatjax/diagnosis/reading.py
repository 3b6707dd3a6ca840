"""Read a network: texts in batches, and for each batch the residual stream and what enters the head."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tokenizers import Tokenizer

from flatjax import cross_entropy
from flatjax.samples import IGNORED_LABEL


class PlacedDecoder(NamedTuple):
    """A placed decoder has its structure and its parameters, which are on the devices."""

    graphdef: nnx.GraphDef
    params: Any
    mesh: Mesh

    @property
    def model(self) -> Any:
        return nnx.merge(self.graphdef, self.params)

    @property
    def head(self) -> Mapping[str, jax.Array]:
        return nnx.to_pure_dict(self.model.head_params())

    def placed(self, array: np.ndarray) -> jax.Array:
        """Split an array's first axis among devices along "data", if it can be."""
        along = "data" if len(array) % self.mesh.shape["data"] == 0 else None
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec(along)))


class Text(NamedTuple):
    """A text is n sequences of t tokens and the one after them, in batches; each batch is in one of several blocks."""

    sequences: np.ndarray
    """Sequences (n, t + 1) of tokens."""
    batch_size: int
    num_blocks: int

    @property
    def num_batches(self) -> int:
        return math.ceil(len(self.sequences) / self.batch_size)

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that are predicted."""
        return self.sequences[:, 1:].size

    @property
    def blocks(self) -> np.ndarray:
        """Return the block that each sequence is in."""
        batches = np.arange(len(self.sequences)) // self.batch_size
        return batches * min(self.num_blocks, self.num_batches) // self.num_batches

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and labels (b, t); a last batch is filled up with what counts nowhere."""
        chosen = self.sequences[index * self.batch_size : (index + 1) * self.batch_size]
        missing = self.batch_size - len(chosen)
        tokens = np.concatenate([chosen[:, :-1], np.zeros_like(chosen[:1, :-1]).repeat(missing, axis=0)])
        labels = np.concatenate([chosen[:, 1:], np.full_like(chosen[:1, 1:], IGNORED_LABEL).repeat(missing, axis=0)])
        return tokens, labels

    def size(self, index: int) -> int:
        """Return how many sequences of a batch count."""
        places = self.places(index)
        return places.stop - places.start

    def places(self, index: int) -> slice:
        """Return the places of a batch's sequences among all."""
        return slice(index * self.batch_size, min((index + 1) * self.batch_size, len(self.sequences)))


class Read(NamedTuple):
    """A reading is a batch, and what the network makes of it."""

    index: int
    labels: np.ndarray
    """Labels (b, t) of the batch."""
    labels_on_device: jax.Array
    stream: jax.Array
    """Residual stream (blocks + 1, b, t, m) of the batch."""
    feats: jax.Array
    """Features (b, t, m) that enter the head."""


def reader(network: PlacedDecoder, text: Text) -> Any:
    """Return a reader of batch after batch."""

    def read(index: int) -> Read:
        tokens, labels = text.batch(index)
        stream, feats = forward(network.graphdef, network.params, network.placed(tokens))
        return Read(index, labels, network.placed(labels), stream, feats)

    return read


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the residual stream, and what enters the head."""
    model = nnx.merge(graphdef, params)
    stream = model.stream(tokens)
    return stream, model.norm(stream[-1])


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """Run a forward pass as in training or use, logits and all; costs are in units of it."""
    return cross_entropy(nnx.merge(graphdef, params)(tokens), labels).mean()


class BySequence(NamedTuple):
    """A part's state can be numbers of each sequence: `{name: (n, ...)}` on the host."""

    text: Text

    def put(self, values: Mapping[str, np.ndarray], index: int, of_batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Return the numbers with those of a batch; sequences that fill it up are left out."""
        places = self.text.places(index)
        changed = {}
        for name, each in jax.device_get(dict(of_batch)).items():
            changed[name] = np.array(values[name])
            changed[name][places] = each[: places.stop - places.start]
        return changed

    def empty(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        return {name: np.full((len(self.text.sequences), *shape), np.nan) for name, shape in shapes.items()}


def tokens_of(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Return the tokens of all texts one after another, each with the token of an end if one has a usual name."""
    ends = [each for name in _ENDS if (each := tokenizer.token_to_id(name)) is not None][:1]
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*each.ids, *ends], np.int32) for each in encoded])


_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
"""A text ends with one of these tokens: GPT-2, Pythia and Qwen, Llama 3, and older ones."""
