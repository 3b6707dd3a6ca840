"""What the transforms have in common: how they are called and several in a chain."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from flatjax import collapse_reg, flat_reg
from flatjax.training import sharpness_aware

from .cases import assert_trees_close, dense_penalty, network, penalty, samples, some_updates


def size(params, batch):
    """A penalty of another unit."""
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) / 2


TRANSFORMS = pytest.mark.parametrize(
    ("name", "tx", "call"),
    [
        ("flat_reg", flat_reg(0.1, penalty), "batch=batch"),
        ("flat_reg", flat_reg(0.1, head="head"), "feats=feats, labels=labels"),
        ("collapse_reg", collapse_reg(0.1, size), "batch=batch"),
        ("sharpness_aware", sharpness_aware(optax.sgd(0.1), 0.1), r"grad_fn=lambda params, _: \.\.\."),
    ],
    ids=["penalty", "head", "collapse_reg", "sharpness_aware"],
)


# How they are called.


@TRANSFORMS
def test_an_update_is_called_as_optax_does(name, tx, call):
    *positional, extra = [
        (each.name, each.kind)
        for each in inspect.signature(tx.update).parameters.values()
        if each.kind != inspect.Parameter.KEYWORD_ONLY
    ]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert positional == [("updates", kind), ("state", kind), ("params", kind)]
    assert extra == ("extra_args", inspect.Parameter.VAR_KEYWORD)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


@TRANSFORMS
def test_what_is_missing_is_a_type_error_that_says_how_to_call_it(name, tx, call):
    params = network()
    with pytest.raises(TypeError, match=rf"{name} got no .*: call tx\.update\(grads, state, params, {call}\)"):
        tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=rf"{name} got no params and no .*: call tx\.update\(grads, state, params, "):
        tx.update(params, tx.init(params))


@TRANSFORMS
def test_a_wrapper_that_loses_arguments_is_named_with_what_to_do(name, tx, call):
    params, given = network(), {"batch": samples(), "feats": 1.0, "labels": 1, "grad_fn": lambda params, _: params}
    accumulating = optax.chain(optax.MultiSteps(tx, 2).gradient_transformation())
    with pytest.raises(TypeError, match=rf"{name} got no .* inside optax\.MultiSteps.* or put {name} before it"):
        accumulating.update(params, accumulating.init(params), params, **given)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    with pytest.raises(TypeError, match=rf"{name} got no .* inside TrainState\.apply_gradients.*: call state\.tx"):
        state.apply_gradients(grads=params)


# Several in a chain.


def two():
    return optax.named_chain(
        ("flatness", flat_reg(0.3, penalty)), ("size", flat_reg(0.2, size)), ("sgd", optax.sgd(0.1))
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_of_two_in_a_named_chain_each_value_is_read_by_its_name(wrapped):
    params, batch = network(), samples()
    tx = optax.apply_if_finite(two(), 5) if wrapped else two()
    got, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
    np.testing.assert_allclose(optax.tree.get(state, "flatness").kappa, dense_penalty(params, batch), rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "size").kappa, size(params, batch), rtol=1e-6)
    both = jax.grad(lambda params: 0.3 * dense_penalty(params, batch) + 0.2 * size(params, batch))(params)
    assert_trees_close(got, jax.tree.map(lambda leaf: -0.1 * leaf, both))
    with pytest.raises(KeyError, match="multiple values for 'kappa'"):
        optax.tree.get(state, "kappa")


def test_of_flatness_and_collapse_each_value_has_a_name_of_its_own():
    params, batch = network(), samples()
    tx = optax.chain(flat_reg(0.3, penalty), collapse_reg(0.2, size), optax.sgd(0.1))
    _, state = tx.update(some_updates(params), tx.init(params), params, batch=batch)
    np.testing.assert_allclose(optax.tree.get(state, "kappa"), dense_penalty(params, batch), rtol=1e-6)
    np.testing.assert_allclose(optax.tree.get(state, "collapse"), size(params, batch), rtol=1e-6)
