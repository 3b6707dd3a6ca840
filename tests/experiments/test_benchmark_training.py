"""The steps that are timed do what they are called."""

import benchmark_training
import jax
import numpy as np
import pytest
from benchmark_training import STEPS, Training


@pytest.fixture
def task():
    with jax.numpy_dtype_promotion("standard"):  # Adam's
        yield benchmark_training.transformer(0, context=4, depth=1, width=8, vocab_size=11, num_tokens=12)


def after_a_step(task, name):
    return Training(*STEPS[name](task), task.params)()[0]


def test_kappa_in_the_loss_and_in_the_chain_is_the_same_step(task):
    joint, by_penalty = after_a_step(task, "κ in the loss"), after_a_step(task, "flat_reg, whole gradient")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), joint, by_penalty)


def test_of_the_head_alone_the_other_layers_are_plainly_trained(task):
    plain, of_head = after_a_step(task, "plain"), after_a_step(task, "flat_reg of the head")
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), plain, of_head)
    assert moved.pop("head")["kernel"] > 1e-6
    assert max(jax.tree.leaves(moved)) < 1e-7


def test_every_step_is_another_one(task):
    heads = {name: np.asarray(after_a_step(task, name)["head"]["kernel"]) for name in STEPS}
    same = {("κ in the loss", "flat_reg, whole gradient")}
    for a in heads:
        for b in heads:
            if a < b and (b, a) not in same and (a, b) not in same:
                assert np.max(np.abs(heads[a] - heads[b])) > 1e-7, (a, b)


def test_a_network_trains_on(task):
    training = Training(*STEPS["flat_reg, whole gradient"](task), task.params)
    before = float(task.loss(training()[0])[0])
    for _ in range(20):
        params, _ = training()
    assert float(task.loss(params)[0]) < before
