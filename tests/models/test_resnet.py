import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import raises

from flatjax.models import ResNet18

from .cases import (
    assert_products_are_differences_of_gradients,
    drawn,
    num_parameters,
    outputs,
    pure_loss,
    slopes,
)

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
LABELS = np.array([4, 0, 2])


@pytest.fixture(autouse=True)
def flax_may_promote():
    """Its normalisations ask for the wider of float32 and the dtype they are given."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@functools.cache
def split_resnet(stem="3x3", mode="eval"):
    def make():
        model = ResNet18(5, width=4, stem=stem, rngs=nnx.Rngs(0))
        getattr(model, mode)()
        return model

    return drawn(make)


@pytest.mark.parametrize(
    ("stem", "num_outputs", "published"),
    [("7x7", 1000, 11_689_512), ("3x3", 10, 11_173_962)],
    ids=["ImageNet", "CIFAR-10"],
)
def test_the_parameters_are_as_many_as_published(stem, num_outputs, published):
    # A head with bias, 1 × 1 shortcuts with normalisation, scales and offsets but no running statistics, and no biases
    # of convolutions: 7²·3·64 + 2·64 of the stem; 147,968, 525,568, 2,099,712 and 8,393,728 of the stages; 512·1000 +
    # 1000 of the head.
    assert num_parameters(lambda: ResNet18(num_outputs, stem=stem, rngs=nnx.Rngs(0))) == published


def test_the_products_at_224_are_as_many_as_published():
    # 1.81e9 multiplications: the image's size after each stride, which the parameters do not tell, is right.
    graphdef, state = nnx.split(nnx.eval_shape(lambda: ResNet18(1000, stem="7x7", rngs=nnx.Rngs(0))))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda state, image: nnx.merge(graphdef, state)(image))(state, image)
    assert num_products(jaxpr.jaxpr) == 1_814_073_344


def num_products(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        size = math.prod(equation.outvars[0].aval.shape)
        match equation.primitive.name:
            case "conv_general_dilated":
                total += size * math.prod(equation.invars[1].aval.shape[:-1])
            case "dot_general":
                total += size * equation.invars[1].aval.shape[0]
            case _:
                inner = (p for p in equation.params.values() if hasattr(p, "jaxpr"))
                total += sum(num_products(p.jaxpr) for p in inner)
    return total


@pytest.mark.parametrize("stem", ["3x3", "7x7"])
def test_the_logits_are_the_head_of_the_features(stem):
    split = split_resnet(stem)
    logits, features = map(np.asarray, outputs(*split, IMAGES))
    assert features.shape == (3, 32)
    kernel, bias = (np.asarray(split[1]["head"][name][...]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(logits, features @ kernel + bias, rtol=1e-12)


def test_samples_do_not_interact_in_eval_mode_and_do_in_training_mode():
    others = np.stack([IMAGES[0], IMAGES[1], IMAGES[2] + 1])
    (before, after), (trained_before, trained_after) = (
        [np.asarray(outputs(*split_resnet(mode=mode), images)[0]) for images in (IMAGES, others)]
        for mode in ("eval", "train")
    )
    np.testing.assert_allclose(after[:2], before[:2], rtol=1e-12)
    assert np.all(np.abs(after[2] - before[2]) > 1e-3)
    assert np.all(np.abs(trained_after[:2] - trained_before[:2]) > 1e-3)


def test_in_training_mode_the_running_statistics_are_renewed_in_the_merged_model_alone():
    graphdef, params, rest = split_resnet(mode="train")
    before = jax.tree.map(np.array, rest)
    model = nnx.merge(graphdef, params, rest, copy=True)  # else it shares its variables with `rest`
    stem = model.stem(jnp.asarray(IMAGES))
    model(jnp.asarray(IMAGES))
    jax.tree.map(np.testing.assert_array_equal, rest, before)
    old = before["stem_norm"]
    means, variances = np.mean(stem, axis=(0, 1, 2)), np.var(stem, axis=(0, 1, 2))
    np.testing.assert_allclose(model.stem_norm.mean[...], 0.9 * old["mean"][...] + 0.1 * means, rtol=1e-12)
    np.testing.assert_allclose(model.stem_norm.var[...], 0.9 * old["var"][...] + 0.1 * variances, rtol=1e-12)


def test_in_eval_mode_a_hessian_product_is_the_difference_of_gradients():
    graphdef, params, rest = split_resnet("7x7")
    assert_products_are_differences_of_gradients(slopes(pure_loss(graphdef, rest)), params, IMAGES, LABELS)


def test_in_training_mode_a_hessian_goes_through_the_statistics():
    # The loss is then blind to the size of a kernel K, so ⟨∇L, K⟩ = 0 and HK = −∇L, but for the ε of a normalisation.
    graphdef, params, rest = split_resnet(mode="train")
    gradient_and_product = slopes(pure_loss(graphdef, rest))
    along = jax.tree.map(jnp.zeros_like, params)
    kernel = params["stem"]["kernel"][...]
    along["stem"]["kernel"] = along["stem"]["kernel"].replace(kernel)
    gradient, product = (x["stem"]["kernel"][...] for x in gradient_and_product(params, along, IMAGES, LABELS))
    size = np.linalg.norm(gradient)
    assert size > 1e-2
    assert np.abs(np.sum(gradient * kernel)) < 1e-4 * size * np.linalg.norm(kernel)
    assert np.linalg.norm(product + gradient) < 1e-3 * size
    assert_products_are_differences_of_gradients(gradient_and_product, params, IMAGES, LABELS)


def test_with_parameters_in_bfloat16_the_outputs_are_float32_and_near_those_of_float64():
    graphdef, params, rest = split_resnet()
    exact, _ = outputs(graphdef, params, rest, IMAGES)
    half, images = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, IMAGES))
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rest)
    got, _ = outputs(graphdef, half, single, images)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=0.05 * np.max(np.abs(exact)))


def test_an_unknown_stem_is_an_error():
    with raises(ValueError, "stem is '5x5', wanted '3x3' or '7x7'"):
        ResNet18(5, stem="5x5", rngs=nnx.Rngs(0))
