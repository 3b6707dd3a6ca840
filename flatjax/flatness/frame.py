"""Choose what the rows of a head are read relative to, so that neither what they share nor their scale costs digits.

A softmax does not change when the same row is taken from all rows of W, or the same number from all biases. Nothing
about a head changes when W is divided by a number and the features are multiplied by it. All of these numbers are free,
then, and only rounding errors depend on them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flatjax.core.dtypes import computing_dtype
from flatjax.core.units import unit_near
from flatjax.flatness.parts import AxisNames, SplitHead, split
from flatjax.heads import LinearHead


class Frame(NamedTuple):
    """Constants that rows are read relative to: (w − `row`) / `unit`, biases b − `bias`, and features φ · `unit`."""

    row: Float[Array, " m"]
    bias: Float[Array, ""]
    unit: Float[Array, ""]


def unit_of(head: LinearHead, axis_names: AxisNames = ()) -> Float[Array, ""]:
    """A power of two in whose units the largest weight is `_LARGEST`.

    The rows of all devices along `axis_names` count.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(head.matrix)))
    largest = largest.astype(computing_dtype(largest))
    if axis_names:
        largest = jax.lax.pmax(largest, axis_names)
    least = float(jnp.finfo(largest.dtype).tiny) * _LARGEST
    return jnp.maximum(unit_near(largest), least) / _LARGEST


def unit_for(feats: Float[Array, "n m"]) -> Float[Array, ""]:
    """A power of two; the largest feature times it is `_LARGEST`."""
    return _LARGEST / unit_near(jnp.max(jnp.abs(feats)))


def frame_of(head: SplitHead, feats: Float[Array, "n m"], unit: Float[Array, ""]) -> Frame:
    """Puts the frame around the rows between which some samples hesitate.

    κ and its gradient are made of their differences.

    A sample that is certain of a row far from all others makes nothing of its distance, and neither does the frame. If
    none hesitates, the frame is in the middle of some rows, as all samples may be certain of the far one.
    """
    head, feats = jax.lax.stop_gradient((head, feats))
    unit = unit.astype(feats.dtype)
    places = jnp.linspace(0, len(feats) - 1, min(len(feats), _SAMPLES)).round()
    # Summed, not sliced: of samples split among devices a slice is cut once all are gathered.
    chosen = places[:, None] == jnp.arange(len(feats), dtype=places.dtype)[None, :]
    chosen = chosen.astype(feats.dtype) @ feats
    predicted = head.predicted(chosen, _ROWS)
    importance = predicted.rest * jnp.sum((chosen * unit) ** 2, axis=1)
    row, bias = mean_by_importance(predicted.rows, importance), mean_by_importance(predicted.biases, importance)
    row = jnp.where(jnp.max(predicted.rest) > _NEGLIGIBLE, row, jnp.median(predicted.some_rows, axis=0))
    return Frame(jnp.where(jnp.isfinite(row), row, 0), jnp.where(jnp.isfinite(bias), bias, 0), unit)


def framed(head: LinearHead, feats: Float[Array, "n m"]) -> LinearHead:
    """A head whose logits are those of a sample up to a number that they share."""
    frame = frame_of(split(head, (), feats), feats, jnp.ones((), feats.dtype))
    return LinearHead(head.weight - frame.row[None, :], head.bias - frame.bias)


def mean_by_importance(values: Float[Array, "n ..."], importance: Float[Array, " n"]) -> Float[Array, "..."]:
    """The plain mean of all but the unimportant; the plain mean too where all have the importance 0."""
    importance = jnp.minimum(importance / (_NEGLIGIBLE * jnp.max(importance)), 1)
    importance = jnp.where(jnp.all(jnp.isfinite(importance)), importance, 1)
    return jnp.tensordot(importance / jnp.sum(importance), values, axes=1)


_LARGEST = 2.0**16
"""The size of the largest number, chosen so that squares have as much room below as above.

A row may then be 1e9 times as far as those that matter.
"""
_SAMPLES, _ROWS = 8, 11
_NEGLIGIBLE = 1e-3
"""The importance, against the largest, from which rows count fully: rounding is least in the middle of what matters."""
