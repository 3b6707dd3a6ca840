import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import raises

from flatjax.models import ViT

from .cases import (
    assert_products_are_differences_of_gradients,
    drawn,
    num_parameters,
    pure_loss,
    slopes,
)

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 6, 1)))
LABELS = jnp.array([4, 0, 2])
SIZES = {"image_size": 6, "patch_size": 2, "channels_in": 1, "width": 6, "num_heads": 3}


@functools.cache
def split_vit(pool, depth=2):
    return drawn(lambda: ViT(5, **SIZES, pool=pool, depth=depth, rngs=nnx.Rngs(0)))


@pytest.fixture(autouse=True)
def flax_may_promote():
    """Its normalisations ask for the wider of float32 and the dtype they are given."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=["class token", "mean"])
def split(request):
    return split_vit(request.param)


def test_the_parameters_are_as_many_as_published():
    # With a class token and its position, biases of queries, keys and values, scales and offsets of normalisations:
    # 147,648 of the patches, 192 + 197·192 of token and positions, 12 · 444,864 of the blocks, 384 of the last
    # normalisation, 193,000 of the head.
    assert num_parameters(lambda: ViT(1000, rngs=nnx.Rngs(0))) == 5_717_416


def test_mean_pooling_needs_neither_token_nor_its_position():
    assert num_parameters(lambda: ViT(1000, pool="mean", rngs=nnx.Rngs(0))) == 5_717_416 - 2 * 192


def test_the_logits_are_the_head_of_the_features(split):
    model = nnx.merge(*split, copy=True)
    features = model.features(IMAGES)
    assert features.shape == (3, 6)
    logits = features @ model.head.kernel[...] + model.head.bias[...][None]
    np.testing.assert_allclose(model(IMAGES), logits, rtol=1e-12)


def test_samples_do_not_interact_and_there_is_no_state_beside_the_parameters(split):
    model = nnx.merge(*split, copy=True)
    outputs, changed = model(IMAGES), model(IMAGES.at[2].multiply(2))
    np.testing.assert_allclose(changed[:2], outputs[:2], rtol=1e-12)
    assert np.all(np.abs(changed[2] - outputs[2]) > 1e-4)
    assert not jax.tree.leaves(split[2])


def test_the_order_of_patches_is_told_by_the_positions_alone(split):
    graphdef, params, rest = split
    # Rows of patches as one block each: the second and the third trade places.
    swapped = jnp.concatenate([IMAGES[:, :2], IMAGES[:, 4:], IMAGES[:, 2:4]], axis=1)
    model = nnx.merge(graphdef, params, rest, copy=True)
    assert np.all(np.abs(model(swapped) - model(IMAGES)) > 1e-6)
    model.positions[...] = jnp.zeros_like(model.positions[...])
    np.testing.assert_allclose(model(swapped), model(IMAGES), rtol=1e-11)


def test_the_features_see_every_patch(split):
    model = nnx.merge(*split, copy=True)
    features = model.features(IMAGES)
    for row, column in itertools.product(range(0, 6, 2), range(0, 6, 2)):
        changed = model.features(IMAGES.at[:, row : row + 2, column : column + 2].add(1))
        assert np.all(np.abs(changed - features) > 1e-6), (row, column)


def test_patches_are_cut_as_rows_of_squares():
    model = nnx.merge(*split_vit("mean"), copy=True)
    squares = np.asarray(IMAGES).reshape(3, 3, 2, 3, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(3, 9, 4)
    kernel, bias = (np.asarray(model.patch_embedding.kernel[...]).reshape(4, 6), model.patch_embedding.bias[...])
    expected = squares @ kernel + np.asarray(bias) + np.asarray(model.positions[...])
    np.testing.assert_allclose(model._embed(IMAGES), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pool", ["class token", "mean"])
def test_a_hessian_product_is_the_difference_of_gradients(pool):
    graphdef, params, rest = split_vit(pool, depth=1)
    assert_products_are_differences_of_gradients(slopes(pure_loss(graphdef, rest)), params, IMAGES, LABELS)


def test_in_bfloat16_outputs_are_bfloat16_and_near_those_of_float64():
    graphdef, params, rest = split_vit("class token")
    exact = nnx.merge(graphdef, params, rest, copy=True)(IMAGES)
    half, images = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, IMAGES))
    outputs = nnx.merge(graphdef, half, rest, copy=True)(images)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs.astype(float), exact, atol=0.05 * np.max(np.abs(exact)))


def test_sizes_that_do_not_fit_and_an_unknown_pool_are_errors():
    with raises(ValueError, "patch_size is 5, wanted a divisor of image_size, 6"):
        ViT(5, image_size=6, patch_size=5, rngs=nnx.Rngs(0))
    with raises(ValueError, "pool is 'max', wanted 'class token' or 'mean'"):
        ViT(5, pool="max", rngs=nnx.Rngs(0))
    with raises(ValueError, r"images are \(8, 8, 1\), wanted \(height, width, channels\) = \(6, 6, 1\)"):
        nnx.merge(*split_vit("mean"), copy=True)(jnp.zeros((3, 8, 8, 1)))
