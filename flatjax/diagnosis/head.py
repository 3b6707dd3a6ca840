"""Measure the head on every token, exactly and without all logits in memory: loss, κ and κ̂, and logit sharpness."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatjax.core.dtypes import computing_dtype
from flatjax.diagnosis.quantities import BLOCKS, mean, quantity
from flatjax.diagnosis.reading import BySequence, PlacedDecoder, Read, Text
from flatjax.diagnosis.stages import Part
from flatjax.flatness import head_logit_sharpness
from flatjax.flatness.tiled.readout import read_out
from flatjax.heads import HeadParams, linear_head
from flatjax.run.records import Record

_EXACT = "exact for these tokens; the standard error is of these tokens as a sample of the text"


def head_part(network: PlacedDecoder, text: Text) -> Part:
    """Build the part that measures loss, perplexity, κ and κ̂."""
    by_sequence = BySequence(text)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("loss", "kappa", "trace", "squared_feature_norm"), ())

    def update(state: Any, read: Read) -> Any:
        return by_sequence.put(state, read.index, of_sequences(network.head, read.feats, read.labels_on_device))

    def finish(state: Any) -> Record:
        tokens, blocks = text.num_tokens, text.blocks
        loss, loss_error = mean(state["loss"], blocks)
        squared_norm = float(linear_head(network.head).squared_norm(jnp.float32))
        trace, trace_error = mean(state["trace"], blocks)
        simplified, simplified_error = squared_norm * trace, squared_norm * trace_error
        return {
            "loss": quantity(loss, loss_error, BLOCKS, tokens, unit="nats a token"),
            "perplexity": quantity(np.exp(loss), np.exp(loss) * loss_error, BLOCKS, tokens),
            "kappa": quantity(*mean(state["kappa"], blocks), BLOCKS, tokens, convention=_EXACT),
            "kappa_hat": quantity(simplified, simplified_error, BLOCKS, tokens, convention=_EXACT),
            "squared_feature_norm": quantity(*mean(state["squared_feature_norm"], blocks), BLOCKS, tokens),
            "squared_head_norm": quantity(squared_norm, 0.0, "none", 0),
        }

    return Part(lambda: by_sequence.empty(shapes), update, finish)


def sharpness_part(network: PlacedDecoder, text: Text, radii: tuple[float, ...]) -> Part:
    """Build the part that measures how the loss rises under the worst change of the logits, by its relative size."""
    by_sequence = BySequence(text)

    def update(state: Any, read: Read) -> Any:
        return by_sequence.put(state, read.index, _rises(network.head, read.feats, read.labels_on_device, radii))

    def finish(state: Any) -> Record:
        rise, error = mean(state["rise"], text.blocks)
        convention = "|δ_j| ≤ ε(|z_j| + 1); of logits and labels alone"
        return {
            "rise": quantity(
                rise, error, BLOCKS, text.num_tokens, radii=radii, unit="nats a token", convention=convention
            )
        }

    return Part(lambda: by_sequence.empty({"rise": (len(radii),)}), update, finish)


@functools.partial(jax.jit, static_argnums=3)
def _rises(head: HeadParams, feats: jax.Array, labels: jax.Array, radii: tuple[float, ...]) -> dict[str, jax.Array]:
    """Return the rises of the loss (b, radii)."""

    def rise(feats: jax.Array, labels: jax.Array, radius: float) -> jax.Array:
        return head_logit_sharpness(head, feats, labels, radius=radius).rise

    of_radii = [jax.vmap(functools.partial(rise, radius=radius))(feats, labels) for radius in radii]
    return {"rise": jnp.stack(of_radii, axis=1)}


@jax.jit
def of_sequences(head: HeadParams, feats: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Return means over the tokens of each sequence (b,), of ℓ, ‖φ‖² v and ‖φ‖² tr G."""
    flat = feats.reshape(-1, feats.shape[-1])
    flat = flat.astype(computing_dtype(flat))
    with jax.default_matmul_precision("highest"):
        readout = read_out(linear_head(head), flat, labels.reshape(-1))
    squares = jnp.sum(flat**2, axis=1)
    is_sound = jnp.isfinite(squares) & linear_head(head).is_finite
    of_tokens = {
        "loss": readout.losses,
        "kappa": readout.flatness,
        "trace": squares * readout.traces,
        "squared_feature_norm": squares,
    }
    return {
        name: jnp.mean(jnp.where(is_sound, values, jnp.nan).reshape(labels.shape), axis=1)
        for name, values in of_tokens.items()
    }


@jax.jit
def kappa_of_batch(head: HeadParams, feats: jax.Array, labels: jax.Array) -> jax.Array:
    """Return κ of a batch without padding."""
    return jnp.mean(of_sequences(head, feats, labels)["kappa"])
