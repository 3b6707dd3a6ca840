import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import raises

from flatjax.models import MLP

from .cases import assert_products_are_differences_of_gradients, drawn, pure_loss, slopes

WIDTHS = (5, 7, 6, 3)
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
LABELS = jnp.array([0, 2, 1, 2])
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def split_mlp(activation="relu", dtype=np.float64, widths=WIDTHS):
    return drawn(lambda: MLP(widths, activation=activation, rngs=nnx.Rngs(0)), dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_affine_maps_with_the_activation_between_them_and_none_after_the_head(activation):
    graphdef, params, rest = split_mlp(activation)
    model = nnx.merge(graphdef, params, rest)
    x = np.asarray(INPUTS)
    for layer in model.layers:
        x = ACTIVATIONS[activation](x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...]))
    np.testing.assert_allclose(model.features(INPUTS), x, rtol=1e-12)
    logits = x @ np.asarray(model.head.kernel[...]) + np.asarray(model.head.bias[...])
    np.testing.assert_allclose(model(INPUTS), logits, rtol=1e-12)
    assert model(INPUTS).shape == (4, 3)
    assert not jax.tree.leaves(rest)


def test_without_hidden_layers_the_features_are_the_input():
    graphdef, params, rest = split_mlp(widths=(5, 3))
    np.testing.assert_array_equal(nnx.merge(graphdef, params, rest).features(INPUTS), INPUTS)
    assert set(params["head"]) == {"kernel", "bias"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_hessian_product_is_the_difference_of_gradients(activation):
    graphdef, params, rest = split_mlp(activation)
    assert_products_are_differences_of_gradients(slopes(pure_loss(graphdef, rest)), params, INPUTS, LABELS)


def test_in_bfloat16_outputs_and_products_are_bfloat16_and_near_those_of_float64():
    graphdef, params, rest = split_mlp("tanh")
    exact = nnx.merge(graphdef, params, rest)(INPUTS)
    half, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, INPUTS))
    outputs = nnx.merge(graphdef, half, rest)(inputs)
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs.astype(float), exact, atol=0.03)
    _, product = slopes(pure_loss(graphdef, rest))(half, half, inputs, LABELS)
    for leaf in jax.tree.leaves(product):
        assert leaf.dtype == jnp.bfloat16
        assert np.all(np.isfinite(leaf.astype(float)))


def test_widths_without_an_output_and_an_unknown_activation_are_errors():
    with raises(ValueError, r"widths is \(5,\), wanted that of the input"):
        MLP((5,), rngs=nnx.Rngs(0))
    with raises(ValueError, "activation is 'swish', wanted one of 'relu', 'tanh', 'gelu'"):
        MLP(WIDTHS, activation="swish", rngs=nnx.Rngs(0))
