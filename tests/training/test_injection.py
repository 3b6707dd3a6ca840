"""What the transforms have in common: how they are called, several in a chain, and none at a strength of 0."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from flatjax import collapse_reg, flat_reg
from flatjax.training import sharpness_aware

from .cases import added, assert_trees_close, dense_penalty, features, network, penalty, samples, some_updates


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
    with pytest.raises(TypeError, match=rf"{name} got no .* inside optax\.MultiSteps.* put {name} before it"):
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


# At a strength of 0.


def warm_up(count):
    return 0.1 * count.astype(float)


def ncc_of_means_that_meet():
    """A network without a body, whose classes all have one mean."""
    params = network()
    params["body"]["kernel"] = jnp.zeros_like(params["body"]["kernel"])
    tx = collapse_reg(warm_up, features=lambda params, batch: (features(params, batch[0]), batch[1]), num_classes=4)
    return tx, params, samples(), "collapse"


def kappa_of_a_bad_batch():
    x, labels = samples()
    return flat_reg(warm_up, penalty), network(), (x.at[0, 0].set(jnp.nan), labels), "kappa"


@pytest.mark.parametrize("case", [ncc_of_means_that_meet, kappa_of_a_bad_batch])
def test_at_a_strength_of_zero_a_bad_gradient_adds_nothing_but_its_value_is_not_hidden(case):
    tx, params, batch, value = case()
    updates = some_updates(params)
    got, state = jax.jit(tx.update)(updates, tx.init(params), params, batch=batch)
    jax.tree.map(np.testing.assert_array_equal, got, updates)
    assert not np.isfinite(optax.tree.get(state, value))
    got, _ = jax.jit(tx.update)(updates, state, params, batch=batch)
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))


def test_a_strength_that_is_nan_is_not_zero():
    params, batch = network(), samples()
    tx = flat_reg(jnp.nan, penalty)
    got, _ = tx.update(some_updates(params), tx.init(params), params, batch=batch)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(got))


def test_the_updates_have_their_slope_in_a_strength_of_zero():
    params, batch = network(), samples()
    tx = flat_reg(0.0, penalty)

    def updates(strength):
        tx = flat_reg(strength, penalty)
        return tx.update(some_updates(params), tx.init(params), params, batch=batch)[0]

    _, slope = jax.jvp(updates, (0.0,), (1.0,))
    assert_trees_close(slope, jax.grad(dense_penalty)(params, batch))
    assert_trees_close(
        added(some_updates(params), 0, slope), tx.update(some_updates(params), tx.init(params), params, batch=batch)[0]
    )
