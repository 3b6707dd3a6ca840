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
    outputs,
    pure_loss,
    slopes,
)

IMAGES = np.random.default_rng(0).normal(size=(3, 6, 6, 1))
LABELS = np.array([4, 0, 2])
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
    with_token, without = (
        num_parameters(lambda pool=pool: ViT(5, **SIZES, pool=pool, depth=1, rngs=nnx.Rngs(0)))
        for pool in ("class token", "mean")
    )
    assert without == with_token - 2 * SIZES["width"]


def test_the_logits_are_the_head_of_the_features(split):
    logits, features = map(np.asarray, outputs(*split, IMAGES))
    assert features.shape == (3, 6)
    kernel, bias = (np.asarray(split[1]["head"][name][...]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-12)


def test_samples_do_not_interact_and_there_is_no_state_beside_the_parameters(split):
    others = np.stack([IMAGES[0], IMAGES[1], 2 * IMAGES[2]])
    before, after = (np.asarray(outputs(*split, images)[0]) for images in (IMAGES, others))
    np.testing.assert_allclose(after[:2], before[:2], rtol=1e-12)
    assert np.all(np.abs(after[2] - before[2]) > 1e-4)
    assert not jax.tree.leaves(split[2])


def test_the_order_of_patches_is_told_by_the_positions_alone(split):
    graphdef, params, rest = split
    # Rows of patches as one block each: the second and the third trade places.
    swapped = np.concatenate([IMAGES[:, :2], IMAGES[:, 4:], IMAGES[:, 2:4]], axis=1)
    before, after = (np.asarray(outputs(graphdef, params, rest, images)[0]) for images in (IMAGES, swapped))
    assert np.all(np.abs(after - before) > 1e-6)
    model = nnx.merge(graphdef, params, rest, copy=True)
    model.positions[...] = jnp.zeros_like(model.positions[...])
    of_nowhere = nnx.split(model, nnx.Param, ...)
    before, after = (np.asarray(outputs(*of_nowhere, images)[0]) for images in (IMAGES, swapped))
    np.testing.assert_allclose(after, before, rtol=1e-11)


def test_the_features_see_every_patch(split):
    features = np.asarray(outputs(*split, IMAGES)[1])
    for row, column in itertools.product(range(0, 6, 2), range(0, 6, 2)):
        others = IMAGES.copy()
        others[:, row : row + 2, column : column + 2] += 1
        changed = np.asarray(outputs(*split, others)[1])
        assert np.all(np.abs(changed - features) > 1e-6), (row, column)


def test_patches_are_cut_as_rows_of_squares():
    model = nnx.merge(*split_vit("mean"), copy=True)
    squares = IMAGES.reshape(3, 3, 2, 3, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(3, 9, 4)
    kernel, bias = (np.asarray(model.patch_embedding.kernel[...]).reshape(4, 6), model.patch_embedding.bias[...])
    expected = squares @ kernel + np.asarray(bias) + np.asarray(model.positions[...])
    np.testing.assert_allclose(model._embed(jnp.asarray(IMAGES)), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("pool", ["class token", "mean"])
def test_a_hessian_product_is_the_difference_of_gradients(pool):
    graphdef, params, rest = split_vit(pool, depth=1)
    assert_products_are_differences_of_gradients(slopes(pure_loss(graphdef, rest)), params, IMAGES, LABELS)


def test_in_bfloat16_outputs_are_bfloat16_and_near_those_of_float64():
    graphdef, params, rest = split_vit("class token")
    exact, _ = outputs(graphdef, params, rest, IMAGES)
    half, images = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, IMAGES))
    got, _ = outputs(graphdef, half, rest, images)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(float), exact, atol=0.05 * np.max(np.abs(exact)))


def test_sizes_that_do_not_fit_and_an_unknown_pool_are_errors():
    with raises(ValueError, "patch_size is 5, wanted a divisor of image_size, 6"):
        ViT(5, image_size=6, patch_size=5, rngs=nnx.Rngs(0))
    with raises(ValueError, "pool is 'max', wanted 'class token' or 'mean'"):
        ViT(5, pool="max", rngs=nnx.Rngs(0))
    with raises(ValueError, r"images are \(8, 8, 1\), wanted \(height, width, channels\) = \(6, 6, 1\)"):
        nnx.merge(*split_vit("mean"), copy=True)(jnp.zeros((3, 8, 8, 1)))
