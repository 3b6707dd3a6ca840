import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flatjax.models import Transformer
from flatjax.models.tokens import look_up
from flatjax.models.transformer import _attention


@pytest.fixture(params=[(1, False), (2, False), (2, True)], ids=["depth 1", "depth 2", "depth 2, normalised"])
def model(request):
    return transformer(*request.param)


@functools.cache
def transformer(depth, normalise):
    return Transformer(
        vocab_size=9,
        num_outputs=7,
        context=5,
        width=8,
        depth=depth,
        num_heads=2,
        normalise=normalise,
        rngs=nnx.Rngs(0),
    )


TOKENS = np.array([[0, 7, 3, 8, 1], [2, 7, 2, 8, 6], [6, 7, 0, 8, 5]])


class Outputs(NamedTuple):
    logits: np.ndarray
    features: np.ndarray
    last_features: np.ndarray
    head_of_features: np.ndarray


@jax.jit
def on_device(model, tokens):
    features = model.features(tokens)
    return Outputs(model(tokens), features, model.last_features(tokens), features @ model.head.kernel[...])


def outputs(model, tokens):
    return jax.device_get(on_device(model, tokens))


def changed(place, tokens):
    """The tokens, with others at a place."""
    copy = TOKENS.copy()
    copy[place] = tokens
    return copy


def test_last_features_are_the_features_of_the_last_position(model):
    got = outputs(model, TOKENS)
    np.testing.assert_allclose(got.last_features, got.features[:, -1], rtol=1e-5, atol=1e-6)


def test_a_position_does_not_see_later_ones(model):
    before, after = (outputs(model, tokens).logits for tokens in (TOKENS, changed(np.s_[:, -1], 4)))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert not np.allclose(before[:, -1], after[:, -1])


def test_a_position_sees_every_earlier_one_and_their_order(model):
    features = outputs(model, TOKENS).last_features
    for position in range(TOKENS.shape[1]):
        after = outputs(model, changed(np.s_[:, position], (TOKENS[:, position] + 1) % 9)).last_features
        assert np.all(np.any(features != after, axis=1)), position
    swapped = TOKENS[:, [2, 1, 0, 3, 4]]
    assert not np.allclose(features[0], outputs(model, swapped).last_features[0])


def test_the_logits_are_the_head_of_the_features(model):
    got = outputs(model, TOKENS)
    np.testing.assert_allclose(got.logits, got.head_of_features, rtol=1e-6)


def test_the_parameters_are_all_of_its_state(model):
    _, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    assert set(params) >= {"token_embedding", "position_embedding", "blocks", "head"}


def test_in_float64_attention_is_exact_to_float64_and_causal():
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 5, 3, 4))
    weights = np.exp(np.einsum("nthk,nshk->nhts", q, k) / 2) * np.tril(np.ones((5, 5)))
    weights /= weights.sum(axis=-1, keepdims=True)
    mask = nnx.make_causal_mask(jnp.zeros((2, 5)))
    got = _attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), mask=mask)
    np.testing.assert_allclose(got, np.einsum("nhts,nshk->nthk", weights, v), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("token", [-1, -9, -100, 9])
def test_a_token_outside_of_the_vocabulary_is_nan_and_other_texts_are_untouched(model, token):
    got = outputs(model, changed((0, 2), token))
    assert np.all(np.isnan(got.logits[0, 2:]))
    np.testing.assert_array_equal(got.logits[1:], outputs(model, TOKENS).logits[1:])
    assert np.all(np.isnan(got.last_features[0]))


def test_positions_beyond_the_context_are_nan():
    assert np.all(np.isnan(outputs(transformer(2, True), np.zeros((1, 6), int)).logits[:, 5]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
@pytest.mark.parametrize("size", [1, 200])
def test_every_token_that_there_is_and_no_other_is_looked_up(size, dtype):
    embedding = nnx.Embed(size, 3, rngs=nnx.Rngs(0))
    info = np.iinfo(dtype)
    tokens = jnp.asarray(np.clip([-100, -1, 0, 1, 100, 127, 199, 200], info.min, info.max), dtype)
    got, rows = look_up(embedding, tokens), np.asarray(embedding.embedding[...])
    for token, row in zip(np.asarray(tokens).tolist(), got, strict=True):
        np.testing.assert_array_equal(row, rows[token] if 0 <= token < size else np.full(3, np.nan))
