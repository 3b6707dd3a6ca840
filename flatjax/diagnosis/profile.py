"""Measure relative flatness of the layers on a part of the text, with probes; that of the head is exact."""

import fnmatch
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from flatjax import Layer, cross_entropy, flatness_profile
from flatjax.core.dtypes import computing_dtype
from flatjax.diagnosis.head import kappa_of_batch
from flatjax.diagnosis.quantities import BLOCKS, quantity
from flatjax.diagnosis.reading import PlacedDecoder, Text
from flatjax.diagnosis.stages import Part
from flatjax.layers import find_layers
from flatjax.layers.names import in_forward_order, short
from flatjax.run.records import Record


def layers_named(params: Any, patterns: tuple[str, ...], *, tied: bool) -> list[Layer]:
    """Return the layers whose path fits a pattern, from the first block on.

    A tied embedding is read as the head that it is. Only the shapes of the parameters are read.

    Raises:
        SystemExit: a pattern fits none.
    """
    found = find_layers(params)
    if unused := [each for each in patterns if not fnmatch.filter(found, f"{each}*")]:
        raise SystemExit(f"--layers has {', '.join(unused)}, which fits none of {', '.join(found)}")
    chosen = [path for path in found if any(fnmatch.fnmatch(path, f"{each}*") for each in patterns)]
    layers = [found[path] for path in in_forward_order(chosen)]
    return [Layer(each.path, (1,)) if tied and each.path == _TIED else each for each in layers]


_TIED = "token_embedding/embedding"


def profile_part(
    network: PlacedDecoder,
    text: Text,
    layers: list[Layer],
    *,
    seed: int,
    num_probes: int,
    max_probes: int,
    relative_error: float | None,
) -> Part:
    """Build the part that measures κ of each batch, with the error of its probes."""
    key, loss = jax.random.key(seed), loss_of(network.graphdef)
    names = [short(layer.path) for layer in layers]
    shape = text.num_batches, len(layers)

    def init() -> Any:
        return {
            "kappa": np.full(shape, np.nan),
            "error": np.full(shape, np.nan),
            "probes": np.zeros(shape, np.int64),
            "head": np.full(shape[0], np.nan),
        }

    def update(state: Any, batch: tuple[int, jax.Array, jax.Array]) -> Any:
        index, tokens, labels = batch
        profile = flatness_profile(
            loss,
            network.params,
            [(tokens, labels)],
            key=jax.random.fold_in(key, index),
            layers=layers,
            num_probes=num_probes,
            max_probes=max_probes,
            relative_error=relative_error,
            route="joint",
        )
        state = {name: np.array(each) for name, each in state.items()}
        for place, (value, error, probes) in enumerate(profile.values()):
            state["kappa"][index, place], state["error"][index, place] = float(value), float(error)
            state["probes"][index, place] = int(probes)
        feats = _feats(network.graphdef, network.params, tokens)
        state["head"][index] = float(kappa_of_batch(network.head, feats, labels))
        return state

    def finish(state: Any) -> Record:
        kappa = np.concatenate([state["kappa"], state["head"][:, None]], axis=1)
        of_probes = np.sqrt(np.sum(state["error"] ** 2, axis=0)) / len(kappa)
        error = kappa.std(axis=0, ddof=1) / np.sqrt(len(kappa)) if len(kappa) > 1 else np.full(len(kappa[0]), np.nan)
        return {
            "layer_kappa": quantity(
                kappa.mean(axis=0), error, BLOCKS, text.num_tokens,
                layers=[*names, "head"],
                error_of_probes=np.append(of_probes, 0.0),
                num_probes=np.append(state["probes"].sum(axis=0), 0),
                num_batches=len(kappa),
                convention="estimated with probes, the head exactly; the standard error is over batches, and has that "
                "of the probes in it",
            )
        }  # fmt: skip

    return Part(init, update, finish)


def batch_reader(network: PlacedDecoder, text: Text) -> Any:
    """Return a reader of tokens and labels in batch after batch; all batches are full."""

    def read(index: int) -> tuple[int, jax.Array, jax.Array]:
        tokens, labels = text.batch(index)
        return index, network.placed(tokens), network.placed(labels)

    return read


@functools.lru_cache(maxsize=8)
def loss_of(graphdef: nnx.GraphDef) -> Any:
    """Return one function for all checkpoints of a structure, so that they are compiled once."""

    def loss(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(tokens)
        return cross_entropy(logits.astype(computing_dtype(logits)), labels).mean()

    return loss


@functools.partial(jax.jit, static_argnums=0)
def _feats(graphdef: nnx.GraphDef, params: Any, tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params).features(tokens)
