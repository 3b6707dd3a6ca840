"""Measure the way of a token through the blocks: how straight, even and exponential it is, and how long by layer."""

from typing import Any

import jax
import jax.numpy as jnp

from flatjax.core.dtypes import computing_dtype
from flatjax.diagnosis.geometry import layer_names
from flatjax.diagnosis.quantities import BLOCKS, mean, quantity
from flatjax.diagnosis.reading import BySequence, PlacedDecoder, Read, Text
from flatjax.diagnosis.stages import Part
from flatjax.representations import growth_variation, line_shape_score, spacing_variation
from flatjax.run.records import Record

_CONVENTION = "median over the tokens of a sequence, mean over the sequences"


def trajectory_part(network: PlacedDecoder, text: Text) -> Part:
    """Build the part for the median token's way in each sequence; a single block has no spacing."""
    by_sequence = BySequence(text)
    depth = network.model.config.depth
    shapes = {"line_shape": (), "growth_rate": (), "norms": (depth + 1,)}
    shapes |= {"spacing": (), "growth_variation": ()} if depth > 1 else {}

    def update(state: Any, read: Read) -> Any:
        return by_sequence.put(state, read.index, _of_sequences(read.stream))

    def finish(state: Any) -> Record:
        more = {"norms": {"layers": layer_names(depth)[:-1]}}
        return {
            name: quantity(
                *mean(state[name], text.blocks), BLOCKS, text.num_tokens, convention=_CONVENTION, **more.get(name, {})
            )
            for name in shapes
        }

    return Part(lambda: by_sequence.empty(shapes), update, finish)


@jax.jit
def _of_sequences(stream: jax.Array) -> dict[str, jax.Array]:
    """Return scores (b,), and norms (b, blocks + 1)."""
    num_blocks = len(stream) - 1
    norms = jnp.linalg.norm(stream.astype(computing_dtype(stream)), axis=-1)
    of_tokens = {
        "line_shape": line_shape_score(stream),
        "growth_rate": (jnp.log(norms[-1]) - jnp.log(norms[0])) / num_blocks,
        "norms": norms,
    }
    if num_blocks > 1:
        of_tokens |= {"spacing": spacing_variation(stream), "growth_variation": growth_variation(stream)}
    medians = {name: jnp.median(each, axis=-1) for name, each in of_tokens.items()}
    return medians | {"norms": medians["norms"].T}
