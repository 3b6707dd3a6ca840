"""The Jacobian of a block in the residual stream at one token, known by its products with vectors."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer

from flatjax.core.dtypes import computing_dtype
from flatjax.core.integers import known_integer, whole_number
from flatjax.core.metric import metric

Block = Callable[[Array], Array]
"""A function (n, t, m) -> (n, t, m).

If it is a pytree, as an `nnx.Module` is, its arrays are arguments of what is compiled.
"""


class Point(NamedTuple):
    """The place at which a block is differentiated."""

    block: Any
    """The block, a pytree that can be called."""
    inputs: Float[Array, "t m"]
    """The stream of one sequence before it."""
    position: Int[Array, ""]


class ResidualJacobian:
    """J = ∂x_{l+1}/∂x_l − I at one position, the other positions held; linearised where it is made."""

    def __init__(self, point: Point):
        block, inputs, position = point
        self.dtype = computing_dtype(inputs)
        self.num_features = inputs.shape[1]

        def at_position(x: Float[Array, " m"]) -> Float[Array, " m"]:
            outputs = block(inputs.at[position].set(x.astype(inputs.dtype))[None])
            if outputs.shape != (1, *inputs.shape):
                raise ValueError(f"a block returns the shape {outputs.shape} for {(1, *inputs.shape)}, wanted the same")
            return outputs[0, position].astype(self.dtype)

        x = inputs[position].astype(self.dtype)
        self._jvp = jax.linearize(at_position, x)[1]
        self._vjp = jax.linear_transpose(self._jvp, x)

    def times(self, vectors: Float[Array, "m k"], chunk_size: int) -> Float[Array, "m k"]:
        """The product J V with several vectors."""
        return _map_columns(self._jvp, vectors, chunk_size) - vectors

    def transposed_times(self, vectors: Float[Array, "m k"], chunk_size: int) -> Float[Array, "m k"]:
        """The product Jᵀ V with several vectors."""
        return _map_columns(lambda vector: self._vjp(vector)[0], vectors, chunk_size) - vectors

    def matrix(self, chunk_size: int) -> Float[Array, "m m"]:
        """The matrix J, by as many products as it has columns."""
        return self.times(jnp.eye(self.num_features, dtype=self.dtype), chunk_size)


def points(blocks: Sequence[Block], stream: ArrayLike, position: int | ArrayLike, sequence: int) -> list[Point]:
    """Makes a point for each block, and checks what it is made of.

    Raises:
        TypeError: the stream is not floating, the position no integer, or a block no callable.
        ValueError: the stream is of another number of blocks, or there is no such position or sequence.
    """
    stream, num_blocks = jnp.asarray(stream), len(blocks)
    if not jnp.issubdtype(stream.dtype, jnp.floating):
        raise TypeError(f"stream has dtype {stream.dtype}, wanted a floating dtype")
    if stream.ndim != 4 or len(stream) not in (num_blocks, num_blocks + 1) or not num_blocks:
        raise ValueError(
            f"stream has shape {stream.shape}, wanted (l, n, t, m), as there are {num_blocks} blocks l = {num_blocks} "
            f"for what enters each, or {num_blocks + 1} with what leaves the last"
        )
    _, num_sequences, num_positions, _ = stream.shape
    sequence, known = whole_number(sequence, "sequence"), known_integer(position, "position")
    if not -num_sequences <= sequence < num_sequences:
        raise ValueError(f"sequence is {sequence}, but stream has {num_sequences}: its shape is {stream.shape}")
    if known is not None and not -num_positions <= known < num_positions:
        raise ValueError(f"position is {position}, but stream has {num_positions}: its shape is {stream.shape}")
    trees = [_as_tree(block) for block in blocks]
    inputs, place = _entering(stream, position if known is None else np.int32(known), sequence=sequence)
    return [Point(block, entering, place) for block, entering in zip(trees, inputs[:num_blocks], strict=True)]


@metric
def _entering(
    stream: Float[Array, "l n t m"], position: Integer[ArrayLike, ""], *, sequence: int
) -> tuple[list[Float[Array, "t m"]], Int[Array, ""]]:
    """The stream of one sequence at each layer, and the position counted from the first."""
    num_positions, position = stream.shape[2], jnp.asarray(position).astype(jnp.int32)
    inside = (position >= -num_positions) & (position < num_positions)
    # What is indexed beyond the end is the last, which nobody asked for.
    inputs = stream[:, sequence] * jnp.where(inside, 1, jnp.nan).astype(stream.dtype)
    return list(inputs), position % num_positions


@jax.jit
def stacked(results: Sequence[Any]) -> Any:
    """Stacks the results of all blocks along a first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)


def _as_tree(block: Block) -> Any:
    """Wraps a function into a tree that holds it, which is then known by which function it is."""
    if not callable(block):
        raise TypeError(f"a block is a {type(block).__name__}, wanted a callable (n, t, m) -> (n, t, m)")
    is_leaf = jax.tree.structure(block) == jax.tree.structure(0)
    return jax.tree_util.Partial(block) if is_leaf else block


def _map_columns(
    function: Callable[[Array], Array], vectors: Float[Array, "m k"], chunk_size: int
) -> Float[Array, "m k"]:
    """Applies a function to so many columns at a time; all chunks are of one size, so that one program serves them."""
    m, k = vectors.shape
    chunk_size = min(chunk_size, k)
    num_chunks = -(-k // chunk_size)
    rows = jnp.pad(vectors.T, ((0, num_chunks * chunk_size - k), (0, 0))).reshape(num_chunks, chunk_size, m)
    results = jax.lax.map(jax.vmap(function), rows) if num_chunks > 1 else jax.vmap(function)(rows[0])
    return results.reshape(-1, m)[:k].T
