"""What the transforms have in common: how they are called."""

import inspect

import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

from flatjax import collapse_reg, flat_reg
from flatjax.training import sharpness_aware

from .cases import network, penalty, samples


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
