"""What the transforms have in common: how they are called, several in a chain, and none at a strength of 0."""

import functools
import inspect
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flatjax import collapse_reg, flat_reg, relative_flatness
from flatjax.training import sharpness_aware

from .cases import (
    added,
    assert_trees_close,
    dense_kappa,
    dense_penalty,
    features,
    network,
    penalty,
    samples,
    some_updates,
)


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


# In a shard_map, by what counts.


def masked_loss(params, batch):
    """The mean of a loss over the samples that count, 0/0 where none does."""
    x, labels, weights = batch
    weights = jnp.where(labels == -100, 0, weights)
    return jnp.sum(weights * jnp.sum(features(params, x) ** 2, axis=1)) / jnp.sum(weights)


def padded(num_samples=24):
    """Each third of a device's samples more padding than that of the one before, and of one device all."""
    x, labels = samples(num_samples)
    number = jnp.arange(num_samples)
    labels = jnp.where((number % 3 >= 2 - number // 12) | (number // 3 == 5), -100, labels)
    return x.at[number // 3 == 5].set(jnp.nan), labels, 0.5 + (number % 2).astype(x.dtype)


def in_a_shard_map(tx, params, *, check_vma, **needed):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def step(params, needed):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, **needed)
        return updates, state[1]

    specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))(params, needed)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("transform", [flat_reg, collapse_reg])
def test_devices_of_unequal_padding_have_together_the_gradient_of_one(transform, check_vma):
    params, batch = network(), padded()
    # As a `where` hides what is NaN from a sum, but not from its derivative.
    whole = jnp.where(jnp.isnan(batch[0]), 0, batch[0]), *batch[1:]
    got, value = in_a_shard_map(transform(0.3, masked_loss, axis_name="data"), params, check_vma=check_vma, batch=batch)
    want = jax.grad(masked_loss)(params, whole)
    assert_trees_close(got, jax.tree.map(lambda leaf: 0.3 * leaf, want), 1e-12)
    np.testing.assert_allclose(value, masked_loss(params, whole), rtol=1e-6)
    by_labels = transform(0.3, masked_loss, axis_name="data", count=lambda batch: jnp.sum(batch[1] != -100))
    other, _ = in_a_shard_map(by_labels, params, check_vma=check_vma, batch=batch)
    assert np.max(np.abs(other["body"]["kernel"] - got["body"]["kernel"])) > 1e-4


def test_the_head_on_devices_of_unequal_padding_has_the_gradient_of_one():
    params, (x, labels, _) = network(), padded()
    feats = features(params, jnp.nan_to_num(x))
    tx = flat_reg(0.3, head="head", axis_name="data")
    got, value = in_a_shard_map(tx, params, check_vma=True, feats=feats, labels=labels)
    counts = labels != -100
    want = jax.grad(dense_kappa)(params["head"], feats[counts], labels[counts])
    assert_trees_close(got["head"], jax.tree.map(lambda leaf: 0.3 * leaf, want), 1e-12)
    np.testing.assert_allclose(value, dense_kappa(params["head"], feats[counts], labels[counts]), rtol=1e-6)


def test_devices_of_padding_alone_have_no_gradient():
    x, labels, weights = padded()
    tx = flat_reg(0.3, masked_loss, axis_name="data")
    got, value = in_a_shard_map(tx, network(), check_vma=True, batch=(x, jnp.full_like(labels, -100), weights))
    assert np.isnan(value)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(got["body"]))


def test_a_batch_that_shows_no_samples_asks_for_a_count():
    params = network()

    def kappa(count):
        tx = flat_reg(0.3, lambda params, batch: batch * size(params, None), axis_name="i", count=count)
        update = jax.vmap(lambda batch: tx.update(params, tx.init(params), params, batch=batch)[1], axis_name="i")
        return update(jnp.arange(2.0)).kappa

    with pytest.raises(ValueError, match="no array with an axis of samples: give a count"):
        kappa(None)
    np.testing.assert_allclose(kappa(lambda batch: 1), size(params, None) / 2, rtol=1e-6)
    np.testing.assert_allclose(kappa(lambda batch: 1 + 2 * batch), size(params, None) * 3 / 4, rtol=1e-6)


# What is no strength.


@pytest.mark.parametrize("transform", [flat_reg, collapse_reg])
@pytest.mark.parametrize(
    "bad",
    [
        *(np.nan, np.inf, -np.inf, np.float32(np.nan), np.array(np.inf), jnp.array(jnp.nan), jnp.float32(-jnp.inf)),
        *(True, np.False_, np.array(True), jnp.array(False), 1j, "0.1", None, jnp.ones(1)),
    ],
    ids=repr,
)
def test_what_is_no_finite_number_is_no_strength(transform, bad):
    with helpers.raises(ValueError, r"strength is .*, wanted a (real|finite) number or a schedule"):
        transform(bad, penalty)


@pytest.mark.parametrize("good", [0, -1, 0.5, np.float32(0.1), np.int64(2), np.array(0.1), jnp.float32(0.1)], ids=repr)
def test_a_finite_number_of_any_kind_is_a_strength(good):
    params, batch = network(), samples()
    for transform in (flat_reg, collapse_reg):
        tx = transform(good, size)
        got, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
        assert_trees_close(got, jax.tree.map(lambda leaf: float(good) * leaf, params), 1e-6)
    for schedule in (optax.linear_schedule(0.0, 1.0, 10), lambda count, scale=0.1: scale, jax.jit(lambda count: 0.1)):
        flat_reg(schedule, size).update(params, flat_reg(schedule, size).init(params), params, batch=batch)


@pytest.mark.parametrize("transform", [flat_reg, collapse_reg])
def test_a_penalty_in_the_place_of_the_strength_is_named(transform):
    message = rf"strength is a function of \(params, batch\), wanted .* {transform.__name__}\(strength, penalty\)"
    for arguments in ((size,), (size, 0.1), (size, size)):
        with helpers.raises(TypeError, message):
            transform(*arguments)
    for no_function in (0.1, "head"):
        with helpers.raises(TypeError, r"penalty is .*, wanted a function, \(params, batch\) -> scalar"):
            transform(0.1, no_function)


def test_a_schedule_of_no_number_is_named():
    tx = flat_reg(lambda count: jnp.ones(2), size)
    with pytest.raises(ValueError, match=r"strength\(count\) is .*, wanted a schedule that returns a real number"):
        tx.update(network(), tx.init(network()), network(), batch=samples())


def labelled_features(params, batch):
    return features(params, batch[0]), batch[1]


@pytest.mark.parametrize(
    ("transform", "arguments", "options", "static"),
    [
        (flat_reg, (penalty,), {}, "penalty"),
        (flat_reg, (), {"penalty": penalty}, "penalty"),
        (flat_reg, (penalty,), {"count": lambda batch: 1}, ("penalty", "count")),
        (collapse_reg, (), {"features": labelled_features, "num_classes": 4}, ("features", "num_classes")),
    ],
)
def test_inject_hyperparams_is_told_what_is_static(transform, arguments, options, static):
    params, batch = network(), samples()
    name = transform.__name__
    with pytest.raises(TypeError, match=re.escape(f"optax.inject_hyperparams({name}, static_args={static!r})")):
        optax.inject_hyperparams(transform)(0.1, *arguments, **options)
    for strength in (0.1, lambda count: 0.1):
        tx = optax.inject_hyperparams(transform, static_args=static)(strength, *arguments, **options)
        got, _ = jax.jit(tx.update)(some_updates(params), tx.init(params), params, batch=batch)
        plain = transform(0.1, *arguments, **options)
        want, _ = jax.jit(plain.update)(some_updates(params), plain.init(params), params, batch=batch)
        assert_trees_close(got, want, 1e-6)


def test_inject_hyperparams_needs_no_static_arguments_without_functions():
    params, (x, labels) = network(), samples()
    tx = optax.inject_hyperparams(flat_reg)(0.1, head="head")
    got, _ = tx.update(some_updates(params), tx.init(params), params, feats=features(params, x), labels=labels)
    assert_trees_close(got["body"], some_updates(params)["body"])
    with pytest.raises(ValueError, match="strength is True"):
        optax.inject_hyperparams(flat_reg)(True, head="head").init(params)
    bound = functools.partial(flat_reg, penalty=penalty)
    with pytest.raises(TypeError, match=r"inject_hyperparams\(factory, static_args='penalty'\)"):
        optax.inject_hyperparams(bound)(0.1)
    optax.inject_hyperparams(bound, static_args="penalty")(0.1).init(params)
    assert list(inspect.signature(flat_reg).parameters)[:2] == ["strength", "penalty"]


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
    tx = flat_reg(lambda count: jnp.nan, penalty)
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


def test_what_is_no_array_in_a_batch_may_decide_what_is_computed():
    def penalty(params, batch):
        x, is_squared = batch
        return jnp.sum((params["w"] * x) ** 2) if is_squared else jnp.sum(params["w"] * x)

    params = {"w": jnp.array([1.0, 2.0])}
    tx = flat_reg(1.0, penalty)
    for is_squared, want in ((True, [18.0, 36.0]), (False, [3.0, 3.0])):
        batch = jnp.array(3.0), is_squared
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
        np.testing.assert_allclose(updates["w"], want)


def test_labels_of_64_bits_in_a_batch_stay_out_of_range_without_x64():
    def penalty(params, batch):
        return relative_flatness(params, *batch)

    with jax.enable_x64(False):
        params = {"kernel": jnp.ones((2, 3)).at[0, 0].set(2)}
        tx = flat_reg(1.0, penalty)
        for label, is_bad in ((1, False), (2**32, True)):
            batch = np.ones((2, 2), "float32"), np.array([0, label])
            _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
            assert np.isnan(state.kappa) == is_bad
