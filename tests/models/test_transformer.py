import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flatjax.models import Transformer
from flatjax.models.tokens import look_up
from flatjax.models.transformer import _attention


@pytest.fixture(params=[(1, False), (2, False), (3, True)], ids=["depth 1", "depth 2", "depth 3, normalised"])
def model(request):
    depth, normalise = request.param
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


TOKENS = jnp.array([[0, 7, 3, 8, 1], [2, 7, 2, 8, 6], [6, 7, 0, 8, 5]])


def test_last_features_are_the_features_of_the_last_position(model):
    np.testing.assert_allclose(model.last_features(TOKENS), model.features(TOKENS)[:, -1], rtol=1e-5, atol=1e-6)


def test_a_position_does_not_see_later_ones(model):
    changed = TOKENS.at[:, -1].set(4)
    np.testing.assert_array_equal(model(TOKENS)[:, :-1], model(changed)[:, :-1])
    assert not np.allclose(model(TOKENS)[:, -1], model(changed)[:, -1])


def test_a_position_sees_every_earlier_one_and_their_order(model):
    features = model.last_features(TOKENS)
    for position in range(TOKENS.shape[1]):
        changed = TOKENS.at[:, position].set((TOKENS[:, position] + 1) % 9)
        assert np.all(np.any(features != model.last_features(changed), axis=1)), position
    swapped = TOKENS[:, jnp.array([2, 1, 0, 3, 4])]
    assert not np.allclose(features[0], model.last_features(swapped)[0])


def test_the_logits_are_the_head_of_the_features(model):
    kernel = jnp.asarray(nnx.state(model.head)["kernel"])
    np.testing.assert_allclose(model(TOKENS), model.features(TOKENS) @ kernel, rtol=1e-6)


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
    tokens = TOKENS.at[0, 2].set(token)
    got = model(tokens)
    assert np.all(np.isnan(got[0, 2:]))
    np.testing.assert_array_equal(got[1:], model(TOKENS)[1:])
    assert np.all(np.isnan(model.last_features(tokens)[0]))


def test_positions_beyond_the_context_are_nan(model):
    assert np.all(np.isnan(model(jnp.zeros((1, 6), int))[:, 5]))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
@pytest.mark.parametrize("size", [1, 200])
def test_every_token_that_there_is_and_no_other_is_looked_up(size, dtype):
    embedding = nnx.Embed(size, 3, rngs=nnx.Rngs(0))
    info = np.iinfo(dtype)
    tokens = jnp.asarray(np.clip([-100, -1, 0, 1, 100, 127, 199, 200], info.min, info.max), dtype)
    got, rows = look_up(embedding, tokens), np.asarray(embedding.embedding[...])
    for token, row in zip(np.asarray(tokens).tolist(), got, strict=True):
        np.testing.assert_array_equal(row, rows[token] if 0 <= token < size else np.full(3, np.nan))
