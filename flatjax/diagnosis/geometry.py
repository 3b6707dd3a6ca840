"""Measure the residual stream by layer: how many directions it fills, from its spectrum over all tokens."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flatjax.core.dtypes import computing_dtype
from flatjax.diagnosis.quantities import BLOCKS, Numbers, jackknife_error, quantity
from flatjax.diagnosis.reading import PlacedDecoder, Read, Text
from flatjax.diagnosis.stages import Part
from flatjax.representations import FeatureSpectrum, RepresentationGeometry
from flatjax.run.records import Record, plain
from flatjax.samples import IGNORED_LABEL

METRICS = ("rankme", "rankme_of_variances", "participation_ratio", "alpha_req")


def layer_names(depth: int) -> list[str]:
    """Name the stream before the first block, after each block, and normalised for the head."""
    return ["embedding", *(f"block {i}" for i in range(depth)), "head"]


def geometry_part(network: PlacedDecoder, text: Text, fit_range: tuple[int, int]) -> Part:
    """Build the part that measures a spectrum per layer and block of text."""
    blocks, config = text.blocks, network.model.config
    num_blocks, num_layers = int(blocks[-1]) + 1, config.depth + 2

    def init() -> FeatureSpectrum:
        (leaf,) = {leaf.dtype for leaf in jax.tree.leaves(network.head)}
        one = FeatureSpectrum.init(config.width, dtype=computing_dtype(leaf))
        return jax.tree.map(lambda leaf: jnp.zeros((num_blocks, num_layers, *leaf.shape), leaf.dtype), one)

    def update(spectra: FeatureSpectrum, read: Read) -> FeatureSpectrum:
        block = int(blocks[text.places(read.index).start])
        return _with_batch(spectra, block, read.stream, read.feats, read.labels_on_device)

    def finish(spectra: FeatureSpectrum) -> Record:
        of_blocks = [jax.tree.map(operator.itemgetter(block), spectra) for block in range(num_blocks)]
        whole = _geometry(_merged_all(of_blocks), fit_range)
        without = [
            _geometry(_merged_all(rest), fit_range)
            for block in range(num_blocks)
            if (rest := of_blocks[:block] + of_blocks[block + 1 :])
        ]
        facts = {
            "layers": layer_names(config.depth),
            "num_resolved": whole.num_resolved,
            "is_rank_limited": bool(np.any(whole.is_rank_limited)),
            "width": config.width,
        }
        measures = {
            name: quantity(
                getattr(whole, name),
                _error([getattr(each, name) for each in without], whole.rankme.shape),
                BLOCKS,
                text.num_tokens,
                **facts,
            )
            for name in METRICS
        }
        measures["alpha_req"] |= plain({"fit_range": fit_range, "r_squared": whole.alpha_req_r_squared})
        ranks = np.unique(np.geomspace(1, config.width, _RANKS_SHOWN).round().astype(int))
        shown = [each.variances[:, ranks - 1] for each in (whole, *without)]
        measures["variances"] = quantity(
            shown[0], _error(shown[1:], shown[0].shape), BLOCKS, text.num_tokens, layers=facts["layers"], ranks=ranks
        )
        return measures

    return Part(init, update, finish)


_RANKS_SHOWN = 32


def _error(reduced: Sequence[Any], shape: tuple[int, ...]) -> Numbers:
    return jackknife_error(reduced) if reduced else np.full(shape, np.nan)


def _merged_all(spectra: list[FeatureSpectrum]) -> FeatureSpectrum:
    return functools.reduce(_merged, spectra)


_merged = jax.jit(jax.vmap(FeatureSpectrum.merge))


@functools.partial(jax.jit, donate_argnums=0)
def _with_batch(
    spectra: FeatureSpectrum, block: jax.Array, stream: jax.Array, feats: jax.Array, labels: jax.Array
) -> FeatureSpectrum:
    layers = jnp.concatenate([stream, feats[None].astype(stream.dtype)])
    weights = (labels != IGNORED_LABEL).astype(spectra.mass.dtype)
    own = jax.tree.map(lambda leaf: leaf[block], spectra)
    updated = jax.vmap(lambda spectrum, feats: spectrum.update(feats, weights))(own, layers)
    return jax.tree.map(lambda leaf, own: leaf.at[block].set(own), spectra, updated)


def _geometry(spectra: FeatureSpectrum, fit_range: tuple[int, int]) -> RepresentationGeometry:
    """Return the measures on the host, with an entry per layer."""
    return jax.device_get(_of_layers(spectra, fit_range))


@functools.partial(jax.jit, static_argnums=1)
def _of_layers(spectra: FeatureSpectrum, fit_range: tuple[int, int]) -> RepresentationGeometry:
    # Not vmapped: a decomposition for many matrices at once is no faster, and takes the memory of all.
    return jax.lax.map(lambda spectrum: spectrum.geometry(fit_range=fit_range), spectra)
