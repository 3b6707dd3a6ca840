"""A head in tiles of rows, with the logits of the samples there, so that all logits are never in memory at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

from flatjax.flatness.frame import Frame
from flatjax.heads import LinearHead


class Tile(NamedTuple):
    """Some rows of a head that follow each other, and the logits of the samples there."""

    rows: Float[Array, "t m"]
    logits: Float[Array, "n t"]
    """The logits; −∞ for the rows that were read before."""
    output: Integer[Array, ""]
    """The output that the first row belongs to."""
    num_read: Integer[Array, ""]
    """How many of the rows were read before: a last tile begins early, to be as large as the others."""

    @property
    def places(self) -> Integer[Array, " t"]:
        return jnp.arange(len(self.rows), dtype=self.output.dtype)

    def is_output(self, outputs: Integer[Array, " n"]) -> Bool[Array, "n t"]:
        """Marks the row of each sample's output, if it was not read before."""
        place, inside = self.find(outputs)
        return self.places[None, :] == jnp.where(inside, place, -1)[:, None]

    def find(self, outputs: Integer[Array, " n"]) -> tuple[Integer[Array, " n"], Bool[Array, " n"]]:
        """An output's place among the rows, and whether it is there and was not read before."""
        place, size = outputs - self.output, len(self.rows)
        return jnp.clip(place, 0, size - 1), (place >= self.num_read) & (place < size)


def tile(
    head: LinearHead,
    frame: Frame,
    feats: Float[Array, "n m"],
    first_output: Integer[Array, ""],
    tile_size: int,
    i: Integer[Array, ""],
) -> Tile:
    """Reads tile `i` of a head, in the frame that `feats` are in.

    The head's rows belong to the outputs from `first_output` on.
    """
    start = _start(head, tile_size, i)
    rows, bias = take_rows(head, tile_size, i, feats.dtype)
    rows = (rows - frame.row[None, :]) / frame.unit
    num_read = i * tile_size - start
    bias = jnp.where(is_unread(head, tile_size, i), bias - frame.bias, -jnp.inf)
    return Tile(rows, feats @ rows.T + bias[None, :], first_output + start, num_read)


def take_rows(
    head: LinearHead, tile_size: int, i: Integer[Array, ""], dtype: jnp.dtype
) -> tuple[Float[Array, "t m"], Float[Array, " t"]]:
    """The rows of tile `i` and their biases, linear in the head."""
    start = _start(head, tile_size, i)
    rows = jax.lax.dynamic_slice_in_dim(head.matrix, start, tile_size, head.rows_axis).astype(dtype)
    bias = jax.lax.dynamic_slice_in_dim(head.bias, start, tile_size).astype(dtype)
    return (rows.T if head.rows_axis else rows), bias


def is_unread(head: LinearHead, tile_size: int, i: Integer[Array, ""]) -> Bool[Array, " t"]:
    """Marks the rows of tile `i` that no tile before it holds."""
    num_read = i * tile_size - _start(head, tile_size, i)
    return jnp.arange(tile_size, dtype=num_read.dtype) >= num_read


def rows_of(head: LinearHead, frame: Frame, outputs: Integer[Array, " n"]) -> Float[Array, "n m"]:
    """The rows of some outputs, in the frame; 0 for an output that the head does not have."""
    inside = (outputs >= 0) & (outputs < head.num_outputs)
    rows = jnp.take(head.matrix, jnp.clip(outputs, 0, head.num_outputs - 1), axis=head.rows_axis)
    rows = (rows.T if head.rows_axis else rows).astype(frame.row.dtype)
    return jnp.where(inside[:, None], (rows - frame.row[None, :]) / frame.unit, 0)


def tile_indices(head: LinearHead, tile_size: int, dtype: jnp.dtype) -> Integer[Array, " _"]:
    """The numbers of the tiles that hold all rows, the last of them ragged."""
    return jnp.arange(-(-head.num_outputs // tile_size), dtype=dtype)


def _start(head: LinearHead, tile_size: int, i: Integer[Array, ""]) -> Integer[Array, ""]:
    return jnp.minimum(i * tile_size, head.num_outputs - tile_size)
