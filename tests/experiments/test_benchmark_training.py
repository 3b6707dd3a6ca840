"""The steps that are timed do what they are called."""

import functools

import jax
import numpy as np
import optax
import pytest

import benchmark_training
from benchmark_training import KNOWN, STEPS, Training


@pytest.fixture(autouse=True)
def _as_experiments_run():
    with jax.numpy_dtype_promotion("standard"):  # Adam's
        yield


@functools.cache
def task():
    return benchmark_training.transformer(0, context=4, depth=1, width=8, vocab_size=11, num_tokens=12)


@functools.cache
def begun(name):
    """A training after its first step, the gradient that Adam was given in that, and the κ that was known by then."""
    training = Training(*(STEPS | KNOWN)[name](task()), task().params)
    _, state = jax.device_get(training())
    gradient = jax.tree.map(lambda leaf: leaf / np.float32(0.1), optax.tree.get(state, "mu"))
    return training, gradient, optax.tree.get(state, "kappa", None)


def test_kappa_in_the_loss_and_in_the_chain_is_the_same_step():
    (_, joint, _), (_, by_penalty, _) = begun("κ in the loss"), begun("flat_reg")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), joint, by_penalty)


def test_of_the_head_alone_the_other_layers_are_plainly_trained():
    (_, plain, _), (_, of_head, _) = begun("plain"), begun("flat_reg of the head")
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), plain, of_head)
    assert moved.pop("head")["kernel"] > 1e-6
    assert max(jax.tree.leaves(moved)) < 1e-7


def test_every_step_is_another_one():
    gradients = {name: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(begun(name)[1])]) for name in STEPS}
    same = {("κ in the loss", "flat_reg")}
    for a in gradients:
        for b in gradients:
            if a < b and (b, a) not in same and (a, b) not in same:
                assert np.max(np.abs(gradients[a] - gradients[b])) > 1e-6, (a, b)


def test_to_know_kappa_changes_no_step():
    plain, *others = (begun(name)[1] for name in KNOWN)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), other, plain)
    kappa = jax.jit(task().loss_and_flatness)(task().params)[1]
    np.testing.assert_allclose(begun("the same, and κ")[2], kappa, rtol=1e-6)


def test_a_network_trains_on():
    training, *_ = begun("flat_reg")
    loss = jax.jit(lambda params: task().loss(params)[0])
    before = float(loss(training()[0]))
    for _ in range(20):
        params, _ = training()
    assert float(loss(params)) < before
