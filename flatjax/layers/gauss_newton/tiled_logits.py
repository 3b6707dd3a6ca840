"""Logits that are never made at once: features and the head that they enter, read in tiles of its rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.core.integers import whole_number
from flatjax.core.sharding import varying_like
from flatjax.core.units import safe_sqrt
from flatjax.curvature.vectors import random_signs
from flatjax.flatness.tiled.tiles import is_unread, take_rows, tile_indices
from flatjax.heads import HeadParams, LinearHead, linear_head


class TiledLogits(NamedTuple):
    """The logits z = Wφ + b of a softmax over a vocabulary, which are made some outputs at a time.

    Return it from `outputs_fn` in the place of the logits.
    """

    feats: Float[Array, "*n m"]
    """The features φ (..., m)."""
    head: HeadParams
    """The head, part of `params` in any layout."""
    tile_size: int = 4096
    """How many outputs are in memory at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the logits would have."""
        return (*self.feats.shape[:-1], linear_head(self.head).num_outputs)


jax.tree_util.register_pytree_node(
    TiledLogits,
    lambda x: ((x.feats, x.head), x.tile_size),
    lambda tile_size, parts: TiledLogits(*parts, tile_size),
)


def cotangent_of(outputs: TiledLogits, weights: Float[Array, "*n"], key: Key[Array, ""]) -> TiledLogits:
    """Pulls √ω_i u_i, random cotangents of the logits of a softmax, back to the features and the head.

    They are what `cotangents` draws, and are functions of features and head. Four products of the size of all logits
    are taken, where the gradient of the loss takes three.
    """
    return jax.grad(_paired)(outputs, outputs, weights, key)


def _paired(
    outputs: TiledLogits, drawn_at: TiledLogits, weights: Float[Array, "*n"], key: Key[Array, ""]
) -> Float[Array, ""]:
    """Σ_i √ω_i ⟨z_i, u_i⟩ with the logits z of one and the cotangents u of the other."""
    dtype = computing_dtype((outputs.feats, outputs.head))
    head, feats = _read(outputs, dtype)
    head_of_draws, feats_of_draws = _read(drawn_at, dtype)
    weights = weights.reshape(-1).astype(dtype)
    # Whatever padding holds, its u is finite, and counts nothing.
    feats_of_draws = jnp.where((weights == 0)[:, None], 0, feats_of_draws)
    size = min(whole_number(outputs.tile_size, "tile_size", least=1), head.num_outputs)
    numbers = tile_indices(head, size, jnp.dtype(jnp.int32))

    def drawn(i: Integer[Array, ""]) -> tuple[Float[Array, "n t"], Float[Array, "n t"]]:
        """The logits of a tile, −∞ where they were read before, and their signs ξ."""
        rows, bias = take_rows(head_of_draws, size, i, dtype)
        bias = jnp.where(is_unread(head, size, i), bias, -jnp.inf)
        logits = jnp.matmul(feats_of_draws, rows.T, precision="highest") + bias[None, :]
        return logits, random_signs(jax.random.fold_in(key, i), logits.shape, dtype)

    @jax.checkpoint
    def read(known: _Online, i: Integer[Array, ""]) -> tuple[_Online, None]:
        return known.after(*drawn(i), i * size), None

    @jax.checkpoint
    def add(total: Float[Array, ""], i: Integer[Array, ""]) -> tuple[Float[Array, ""], None]:
        rows, bias = take_rows(head, size, i, dtype)
        logits = jnp.matmul(feats, rows.T, precision="highest") + bias[None, :]
        u = softmax.cotangents(*drawn(i), i * size)
        return total + jnp.sum(roots[:, None] * u * logits), None

    like = (feats, feats_of_draws, head.matrix, head_of_draws.matrix, weights, jax.random.key_data(key))
    softmax, _ = jax.lax.scan(read, varying_like(_Online.before(feats), like), numbers)
    roots = safe_sqrt(weights)
    return jax.lax.scan(add, varying_like(jnp.zeros((), dtype), like), numbers)[0]


def _read(outputs: TiledLogits, dtype: jnp.dtype) -> tuple[LinearHead, Float[Array, "n m"]]:
    head = linear_head(outputs.head)
    return head, outputs.feats.reshape(-1, head.num_features).astype(dtype)


class _Online(NamedTuple):
    """What is known of the softmax of each sample after some tiles, relative to its largest logit so far."""

    largest: Float[Array, " n"]
    place: Integer[Array, " n"]
    """Where the largest is, counted by tiles as they are read."""
    sign: Float[Array, " n"]
    """The sign ξ of the largest."""
    others: Float[Array, " n"]
    """Σ exp(z_c − z_k) over all but the largest, k."""
    signed_roots: Float[Array, " n"]
    """Σ ξ_c exp((z_c − z_k)/2) over the same."""

    @classmethod
    def before(cls, feats: Float[Array, "n m"]) -> "_Online":
        """Nothing is known before the first tile."""
        zeros = jnp.zeros_like(feats, shape=feats.shape[:1])
        return cls(zeros - jnp.inf, jnp.full_like(zeros, -1, dtype=jnp.int32), zeros, zeros, zeros)

    def after(self, logits: Float[Array, "n t"], signs: Float[Array, "n t"], start: Integer[Array, ""]) -> "_Online":
        """What is known after a further tile."""
        of_tile = jnp.argmax(logits, axis=1)
        is_newer = jnp.max(logits, axis=1) > self.largest
        place = jnp.where(is_newer, start + of_tile.astype(self.place.dtype), self.place)
        is_largest = _is_at(logits, place, start)
        # Looked up, as the derivative of a maximum is shared among those that are equally large.
        largest = jnp.where(is_newer, jnp.sum(jnp.where(is_largest, logits, 0), axis=1), self.largest)
        sign = jnp.where(is_newer, jnp.sum(jnp.where(is_largest, signs, 0), axis=1), self.sign)
        # Before anything is known, and where classes are left out, −∞ is taken from −∞.
        origin = jnp.where(largest == -jnp.inf, 0, largest)
        root = jnp.exp((self.largest - origin) / 2)
        roots = jnp.where(is_largest, 0, jnp.exp((logits - origin[:, None]) / 2))
        others = root**2 * (self.others + jnp.where(is_newer, 1, 0)) + jnp.sum(roots**2, axis=1)
        signed = root * (self.signed_roots + jnp.where(is_newer, self.sign, 0)) + jnp.sum(signs * roots, axis=1)
        return _Online(largest, place, sign, others, signed)

    def cotangents(
        self, logits: Float[Array, "n t"], signs: Float[Array, "n t"], start: Integer[Array, ""]
    ) -> Float[Array, "n t"]:
        """The entries of u in a tile, once all tiles are read."""
        size = jnp.sqrt(1 + self.others)
        of_others = self.signed_roots / size
        of_all = of_others + self.sign / size
        roots = jnp.exp((logits - self.largest[:, None]) / 2) / size[:, None]
        u = roots * signs - roots**2 * of_all[:, None]
        of_largest = of_all * self.others / (1 + self.others) - of_others
        return jnp.where(_is_at(logits, self.place, start), of_largest[:, None], u)


def _is_at(logits: Float[Array, "n t"], place: Integer[Array, " n"], start: Integer[Array, ""]) -> Bool[Array, "n t"]:
    places = start + jnp.arange(logits.shape[1], dtype=place.dtype)
    return places[None, :] == place[:, None]
