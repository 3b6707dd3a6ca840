"""Measure neural collapse over the vocabulary: a class is a next token, a feature what enters the head before it.

The text tells how often each token comes next, so that only the classes that have enough samples are kept in memory.
Each block of the text has moments of its own, and the standard error is that of leaving one block out.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flatjax import ClassMoments, collapse_report
from flatjax.collapse import nc4
from flatjax.core.dtypes import computing_dtype
from flatjax.diagnosis.quantities import BLOCKS, jackknife_error, quantity, ratio
from flatjax.diagnosis.reading import BySequence, PlacedDecoder, Read, Text
from flatjax.diagnosis.stages import Part
from flatjax.heads import HeadParams, linear_head
from flatjax.run.records import Record
from flatjax.samples import IGNORED_LABEL

METRICS = ("cdnv", "nc3", "unc3", "gnc2_mean_means", "gnc2_variation_means", "gnc2_mean_classifier",
           "gnc2_variation_classifier", "nc2_equinorm_means", "nc2_equinorm_classifier",
           "nc2_equiangularity_means", "nc2_equiangularity_classifier")  # fmt: skip


class Classes(NamedTuple):
    """Classes are the tokens that come next often enough."""

    tokens: np.ndarray
    """Tokens (C,) that are the classes."""
    places: np.ndarray
    """Place (d,) of each token of the vocabulary among the classes, or −100."""
    num_seen: int
    vocab_size: int

    @classmethod
    def of(cls, text: Text, vocab_size: int, min_count: int) -> "Classes":
        counts = np.bincount(text.sequences[:, 1:].ravel(), minlength=vocab_size)
        tokens = np.flatnonzero(counts >= min_count)
        if len(tokens) < 2:
            raise SystemExit(
                f"--min-count is {min_count}, but {len(tokens)} tokens come next so often in {text.num_tokens} tokens "
                "of text: give more text, or a lower number"
            )
        places = np.full(vocab_size, IGNORED_LABEL, np.int32)
        places[tokens] = np.arange(len(tokens))
        return cls(tokens, places, int(np.count_nonzero(counts)), vocab_size)

    def labels(self, labels: np.ndarray) -> np.ndarray:
        """Return places among the classes; −100 stands for tokens that are none of them, and for padding."""
        return np.where(labels == IGNORED_LABEL, IGNORED_LABEL, self.places[np.maximum(labels, 0)])


def collapse_part(network: PlacedDecoder, text: Text, classes: Classes, min_count: int) -> Part:
    """Build the part that measures all that moments tell."""
    blocks = text.blocks
    num_blocks = int(blocks[-1]) + 1

    def init() -> ClassMoments:
        head = linear_head(network.head)
        dtype = computing_dtype(head.matrix)
        one = ClassMoments.init(len(classes.tokens), head.num_features, dtype=dtype)
        return jax.tree.map(lambda leaf: jnp.zeros((num_blocks, *leaf.shape), leaf.dtype), one)

    def update(moments: ClassMoments, read: Read) -> ClassMoments:
        labels = network.placed(classes.labels(read.labels))
        return _with_batch(moments, int(blocks[text.places(read.index).start]), read.feats, labels)

    def finish(moments: ClassMoments) -> Record:
        head = rows_of(network.head, classes.tokens)
        of_blocks = split(moments)
        whole = jax.device_get(collapse_report(merged(of_blocks), head, min_count=min_count))
        # Of the same classes: one that is just frequent enough is not to come and go with a block.
        without = [
            jax.device_get(collapse_report(merged(rest), head, min_count=2))
            for block in range(num_blocks)
            if (rest := of_blocks[:block] + of_blocks[block + 1 :])
        ]
        num_tokens = int(np.sum(classes.labels(text.sequences[:, 1:]) != IGNORED_LABEL))
        counts = {
            "num_classes": int(whole.num_classes_kept),
            "num_classes_seen": classes.num_seen,
            "vocab_size": classes.vocab_size,
            "min_count": min_count,
        }
        return {
            name: quantity(
                getattr(whole, name), jackknife_error([getattr(each, name) for each in without]), BLOCKS, num_tokens,
                convention="the standard error is of these classes, whichever the text has", **counts,
            )
            for name in METRICS
        }  # fmt: skip

    return Part(init, update, finish)


def decisions_part(network: PlacedDecoder, text: Text, classes: Classes, moments: ClassMoments, min_count: int) -> Part:
    """Build the part for NC4, on the tokens that the means are of; the means are taken as given."""
    by_sequence = BySequence(text)
    of_vocabulary = among_vocabulary(merged(split(moments)), classes)

    def update(state: Any, read: Read) -> Any:
        decisions = _decisions(of_vocabulary, network.head, read.feats, read.labels_on_device, min_count)
        return by_sequence.put(state, read.index, decisions)

    def finish(state: Any) -> Record:
        value, error = ratio(state["disagreeing"], state["total"], text.blocks)
        facts = {"num_classes": len(classes.tokens), "convention": "class means are taken as given, in its error too"}
        return {"nc4": quantity(value, error, BLOCKS, int(state["total"].sum()), **facts)}

    return Part(lambda: by_sequence.empty({"disagreeing": (), "total": ()}), update, finish)


def split(moments: ClassMoments) -> list[ClassMoments]:
    """Split moments into those of each block."""
    return [jax.tree.map(operator.itemgetter(block), moments) for block in range(len(moments.counts))]


def merged(moments: list[ClassMoments]) -> ClassMoments:
    """Merge the moments of all blocks."""
    return functools.reduce(_merged, moments)


_merged = jax.jit(ClassMoments.merge)


@functools.partial(jax.jit, donate_argnums=0)
def _with_batch(moments: ClassMoments, block: jax.Array, feats: jax.Array, labels: jax.Array) -> ClassMoments:
    """Update the moments of one of the blocks by a batch."""
    updated = jax.tree.map(lambda leaf: leaf[block], moments).update(feats, labels)
    return jax.tree.map(lambda leaf, own: leaf.at[block].set(own), moments, updated)


@jax.jit
def rows_of(head: HeadParams, tokens: jax.Array) -> HeadParams:
    """Return the head of some tokens only."""
    read = linear_head(head)
    rows = jnp.take(read.matrix, tokens, axis=read.rows_axis)
    return {"kernel" if read.rows_axis else "embedding": rows}


def among_vocabulary(moments: ClassMoments, classes: Classes) -> ClassMoments:
    """Return moments with a class per token of the vocabulary; most of them are empty."""
    empty = ClassMoments.init(classes.vocab_size, moments.num_features, dtype=moments.dtype)
    return jax.tree.map(lambda all_, some: all_.at[classes.tokens].set(some) if some.ndim else some, empty, moments)


@functools.partial(jax.jit, static_argnums=4)
def _decisions(
    moments: ClassMoments, head: HeadParams, feats: jax.Array, labels: jax.Array, min_count: int
) -> dict[str, jax.Array]:
    """Count the disagreeing tokens and all tokens of each sequence."""
    of_one = functools.partial(nc4, min_count=min_count)
    sums = jax.vmap(lambda feats, labels: of_one(moments, head, feats, labels))(feats, labels)
    return sums._asdict()
