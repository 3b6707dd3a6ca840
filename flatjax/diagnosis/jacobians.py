"""Compare the blocks' residual Jacobians at some tokens: do they stretch the stream along the same directions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatjax.diagnosis.quantities import NONE, WINDOWS, quantity
from flatjax.diagnosis.reading import PlacedDecoder, Read, Text
from flatjax.diagnosis.stages import Part
from flatjax.representations import (
    block_couplings,
    inverse_norm_growth,
    projections,
    residual_alignment,
    residual_jacobians,
    residual_projections,
)
from flatjax.representations.jacobians import OVERSAMPLING
from flatjax.run.records import Record

_ITERATIONS = 4


def check_depth(depth: int) -> None:
    """Check that there are blocks to compare.

    Raises:
        SystemExit: there are too few blocks.
    """
    if depth < 2:
        raise SystemExit(
            f"the network has {depth} block, of which none is to be compared: leave jacobians out of --parts"
        )


def jacobians_part(network: PlacedDecoder, text: Text, num_directions: int, seed: int) -> Part:
    """Build the part that reads each window's last token, which sees all of it; the blocks run on nothing else."""
    depth, width = network.model.config.depth, network.model.config.width
    check_depth(depth)
    top = min(num_directions, width)
    # In products a block: two a round for each vector, and of all others' vectors.
    is_exact = width <= 2 * (_ITERATIONS + 1) * (top + OVERSAMPLING) + 2 * depth * top
    key, length = jax.random.key(seed), text.sequences.shape[1] - 1
    shapes = {
        "alignment": (),
        "coupling": (),
        "alignment_matrix": (depth, depth),
        "coupling_matrix": (depth, depth),
        "singular_values": (depth, top),
        "inverse_norm_r_squared": (),
        "relative_residual": (),
    }

    def init() -> Any:
        return {name: np.full((text.num_batches, *shape), np.nan) for name, shape in shapes.items()}

    def update(state: Any, read: Read) -> Any:
        blocks = list(network.model.blocks)
        of_window = jax.random.fold_in(key, read.index)
        triplets = residual_jacobians(
            blocks,
            read.stream,
            length - 1,
            top=None if is_exact else top,
            key=None if is_exact else of_window,
            num_iterations=_ITERATIONS,
        )
        largest = triplets.top(top)
        if is_exact:
            between = projections(triplets.matrices(), largest)
        else:
            between = residual_projections(blocks, read.stream, length - 1, largest)
        alignment, couplings = residual_alignment(between), block_couplings(largest, between)
        values = {
            "alignment": alignment.score,
            "coupling": jnp.sum(couplings) / (depth * (depth - 1)),
            "alignment_matrix": alignment.forward,
            "coupling_matrix": couplings,
            "singular_values": largest.S,
            "inverse_norm_r_squared": inverse_norm_growth(largest.S).r_squared,
            "relative_residual": jnp.max(largest.residuals / largest.S[:, :1]),
        }
        return {name: _with(state[name], read.index, value) for name, value in values.items()}

    def finish(state: Any) -> Record:
        number = len(state["alignment"])
        facts = {
            "num_windows": number,
            "window_context": length,
            "num_directions": top,
            "method": "exact" if is_exact else "matrix-free",
            "blocks": [f"block {i}" for i in range(depth)],
        }
        record = {}
        for name, values in state.items():
            if name == "relative_residual":  # a bound, of all windows
                record[name] = quantity(values.max(), np.nan, NONE, number, **facts)
                continue
            spread = values.std(axis=0, ddof=1) if number > 1 else np.full(values.shape[1:], np.nan)
            record[name] = quantity(
                values.mean(axis=0), spread / np.sqrt(number), WINDOWS, number, spread=spread, **facts
            )
        return record

    return Part(init, update, finish)


def _with(values: np.ndarray, index: int, value: jax.Array) -> np.ndarray:
    values = np.array(values)
    values[index] = np.asarray(value)
    return values
