"""The steps that are timed do what they are called."""

import jax
import numpy as np
import optax
import pytest

import benchmark_training
from benchmark_training import KNOWN, STEPS, Training


@pytest.fixture
def task():
    with jax.numpy_dtype_promotion("standard"):  # Adam's
        yield benchmark_training.transformer(0, context=4, depth=1, width=8, vocab_size=11, num_tokens=12)


def gradient(task, name):
    """That Adam is given in the first step."""
    _, state = Training(*(STEPS | KNOWN)[name](task), task.params)()
    return jax.tree.map(lambda leaf: np.asarray(leaf) / 0.1, optax.tree.get(state, "mu"))


def test_kappa_in_the_loss_and_in_the_chain_is_the_same_step(task):
    joint, by_penalty = gradient(task, "κ in the loss"), gradient(task, "flat_reg")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), joint, by_penalty)


def test_of_the_head_alone_the_other_layers_are_plainly_trained(task):
    plain, of_head = gradient(task, "plain"), gradient(task, "flat_reg of the head")
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), plain, of_head)
    assert moved.pop("head")["kernel"] > 1e-6
    assert max(jax.tree.leaves(moved)) < 1e-7


def test_every_step_is_another_one(task):
    gradients = {
        name: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient(task, name))]) for name in STEPS
    }
    same = {("κ in the loss", "flat_reg")}
    for a in gradients:
        for b in gradients:
            if a < b and (b, a) not in same and (a, b) not in same:
                assert np.max(np.abs(gradients[a] - gradients[b])) > 1e-6, (a, b)


def test_to_know_kappa_changes_no_step(task):
    plain, *others = (gradient(task, name) for name in KNOWN)
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), other, plain)
    (_, state), kappa = Training(*KNOWN["the same, and κ"](task), task.params)(), task.loss_and_flatness(task.params)[1]
    np.testing.assert_allclose(state["kappa"], kappa, rtol=1e-6)


def test_a_network_trains_on(task):
    training = Training(*STEPS["flat_reg"](task), task.params)
    before = float(task.loss(training()[0])[0])
    for _ in range(20):
        params, _ = training()
    assert float(task.loss(params)[0]) < before
