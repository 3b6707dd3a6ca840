"""Small networks trained beside each other."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flatjax
import regularise
from flatjax.models import MLP
from harness.data import few_labels
from harness.training.regularisers import REGULARISERS
from harness.training.small_networks import PARTS, Programs, network


@contextlib.contextmanager
def as_experiments_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def bench():
    """A perceptron's programs, and a maker of its trials."""
    config = regularise.Config(width=5, steps=6, batch_size=20, num_few=40, num_wrong=60, num_validation=30)
    digits = few_labels.digits()
    small = network(lambda rngs: MLP((64, 5, 10), rngs=rngs))
    programs = Programs(small, regularise.inputs("mlp", digits.pixels), config.steps)

    def make(rate: float, strength: float | None, seed: int, task: str = "few"):
        return regularise.trial(config, small, digits.labels, task, (rate, strength), seed)

    with as_experiments_run():
        yield programs, make


def trained(bench, method: str, rate: float, strength: float | None, end: int | None = None) -> dict:
    """The parameters of one network."""
    programs, make = bench
    state = programs.train(REGULARISERS[method], programs.parallel.stack([make(rate, strength, 0)]), end)
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state["params"])


@pytest.mark.parametrize("method", [name for name in REGULARISERS if name != "baseline"])
def test_a_method_of_no_strength_is_the_baseline(bench, method):
    one, other = (trained(bench, name, 0.1, 0.0) for name in (method, "baseline"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_weight_decay_pulls_every_parameter_towards_nothing(bench):
    rate, strength = 0.1, 0.5
    start = bench[1](rate, strength, 0).start["params"]
    plain, decayed = (trained(bench, name, rate, strength, end=1) for name in ("baseline", "weight_decay"))
    jax.tree.map(
        lambda w, a, b: np.testing.assert_allclose(b - a, -rate * strength * w, atol=1e-6), start, plain, decayed
    )


@pytest.mark.parametrize("method", ["kappa", "simplified_kappa"])
def test_a_penalty_on_kappa_lowers_it(bench, method):
    programs, make = bench
    trials = [make(0.1, strength, 0) for strength in (0.0, 0.1)]
    plain, flat = programs.run(REGULARISERS[method], trials)
    assert flat["relative_flatness"] < 0.9 * plain["relative_flatness"]


def test_a_network_learns_the_same_whatever_others_are_trained_beside_it(bench):
    programs, make = bench
    trials = [make(0.1, 0.01, seed, task) for seed, task in ((0, "few"), (1, "wrong"), (2, "few"))]
    together = programs.run(REGULARISERS["kappa"], trials)
    assert programs.run(REGULARISERS["kappa"], trials[1:2]) == together[1:2]
    assert together[0] != together[1]


def test_what_is_measured_is_of_the_part_that_is_named(bench):
    programs, make = bench
    chosen = make(0.3, None, 0, "wrong")
    (measured,) = programs.run(REGULARISERS["baseline"], [chosen])
    state = programs.train(REGULARISERS["baseline"], programs.parallel.stack([chosen]))
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), state["params"])
    model = nnx.merge(programs.network.in_use, params, {})
    feats = np.asarray(model.features(programs.images))
    logits = feats @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    for place, part in enumerate(PARTS, start=1):
        right = (logits.argmax(axis=1) == chosen.labels)[chosen.parts == place]
        np.testing.assert_allclose(measured[f"{part}_accuracy"], right.mean(), rtol=1e-6)
    is_train = chosen.parts == 1
    kappa = flatjax.relative_flatness(params["head"], feats[is_train], chosen.labels[is_train])
    np.testing.assert_allclose(measured["relative_flatness"], kappa, rtol=1e-5)
    losses = flatjax.cross_entropy(jnp.asarray(logits[is_train]), jnp.asarray(chosen.labels[is_train]))
    np.testing.assert_allclose(measured["train_loss"], losses.mean(), rtol=1e-5)


def test_a_network_that_diverged_has_no_accuracy_and_its_setting_is_not_chosen(bench):
    programs, make = bench
    diverged, fine = programs.run(REGULARISERS["baseline"], [make(1e30, None, 0), make(1e-6, None, 0)])
    assert np.isnan(diverged["test_accuracy"])
    assert 0 <= fine["test_accuracy"] < 0.5
    tuned = [
        {"seeds": {"0": {"validation_accuracy": value}, "1": {"validation_accuracy": 1.0}}}
        for value in (None, 0.1, 0.3, 0.3)
    ]
    assert regularise.best_of(tuned) is tuned[2]
