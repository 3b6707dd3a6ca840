"""Σκ of layers by one random direction, against dense float64 Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises

from flatjax import Layer, cross_entropy, layer_relative_flatness, sampled_flatness

from .cases import perceptron
from .uses import PATH, USES

LAYERS = ("layer0/kernel", "layer1/kernel")


def sampled(case, layers, key):
    return sampled_flatness(case.loss_fn, case.params, *case.batch, layers=layers, key=key)


def exact(case, layers):
    kappas = [
        layer_relative_flatness(case.loss_fn, case.params, *case.batch, layer=x, method="weights") for x in layers
    ]
    return sum(float(np.sum(kappa.value)) for kappa in kappas)


@pytest.mark.parametrize("case", [perceptron(), USES["scanned"].case()], ids=["two layers", "a stack"])
def test_its_mean_is_the_sum_of_kappa_over_the_layers(case):
    layers = LAYERS if "layer0" in case.params else (PATH, "head/kernel")
    values = jax.lax.map(functools.partial(sampled, case, layers), jax.random.split(jax.random.key(0), 4000))
    error = np.std(values, ddof=1) / len(values) ** 0.5
    want = exact(case, layers)
    assert error < 0.1 * abs(want)
    assert abs(np.mean(values) - want) < 4 * error


def test_a_layer_of_one_feature_is_exact_in_every_draw():
    case = perceptron(sizes=(1, 5, 3))
    for seed in range(3):
        got = sampled(case, ["layer0/kernel"], jax.random.key(seed))
        np.testing.assert_allclose(got, exact(case, ["layer0/kernel"]), rtol=1e-10)


def test_its_gradient_is_that_of_finite_differences_in_every_parameter():
    case, key = perceptron(), jax.random.key(1)
    value = jax.jit(lambda params: sampled(case._replace(params=params), LAYERS, key))
    rng = np.random.default_rng(2)
    change = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), case.params)
    slope = jax.jvp(value, (case.params,), (change,))[1]
    step = 1e-5
    ahead, behind = (jax.tree.map(lambda x, c, t=t: np.asarray(x) + t * c, case.params, change) for t in (step, -step))
    np.testing.assert_allclose(slope, (value(ahead) - value(behind)) / (2 * step), rtol=1e-7)
    gradient = jax.grad(value)(case.params)
    along = sum(np.sum(g * c) for g, c in zip(jax.tree.leaves(gradient), jax.tree.leaves(change), strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-10)


def test_it_keeps_its_digits_in_the_collapsed_regime():
    """Where the loss is about 1e-12, in float32."""
    x = np.array([[1.0, 0.2], [-1.0, 0.3], [0.9, -0.1]], np.float32)
    params = {"layer0": {"kernel": np.array([[14.0, -14.0], [0.5, 0.1]], np.float32)}}

    def loss(params, x, y):
        return cross_entropy(x @ params["layer0"]["kernel"], y).mean()

    def value(dtype):
        return sampled_flatness(
            loss, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params), jnp.asarray(x, dtype),
            jnp.array([0, 1, 0]), layers=["layer0/kernel"], key=jax.random.key(0),
        )  # fmt: skip

    assert 0 < value(jnp.float64) < 1e-7
    np.testing.assert_allclose(value(jnp.float32), value(jnp.float64), rtol=1e-4)


def test_it_follows_what_a_layer_says_of_its_axes():
    case, layer = USES["out, in"].case(), USES["out, in"].layer
    key = jax.random.key(0)
    np.testing.assert_array_equal(sampled(case, [PATH], key), sampled(case, [layer], key))
    with raises(ValueError, "feature_axes"):
        sampled(case, [Layer(PATH, (0,))], key)


@pytest.mark.parametrize(
    ("error", "message", "layers", "key"),
    [
        (ValueError, "layers is empty, wanted at least one", [], jax.random.key(0)),
        (ValueError, "wanted several", "layer0/kernel", jax.random.key(0)),
        (ValueError, "names a leaf twice", ["layer0/kernel", Layer("layer0/kernel", (0,))], jax.random.key(0)),
        (ValueError, "no leaf at 'layer9/kernel'", ["layer9/kernel"], jax.random.key(0)),
        (TypeError, r"key is .*, wanted one key: jax\.random\.key", ["layer0/kernel"], 0),
    ],
)
def test_bad_input_is_named(error, message, layers, key):
    with raises(error, message):
        sampled(perceptron(), layers, key)
