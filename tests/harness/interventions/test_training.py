"""What an arm adds to the loss, and its seeds trained in one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Problem, collapsed_problem, dense_flatness, softmax_cross_entropy

from harness.interventions.arms import CONTROLS, QUANTITIES, Rule, distance_from_level, measured
from harness.interventions.bounds import Bounds
from harness.interventions.learners import Learner, Samples, image_classification
from harness.interventions.training import SeedTrainer, Setting, gradient

NUM_CLASSES, LEVEL, STRENGTH = 3, 0.7, 0.3
BOUNDS = Bounds(feature_norm=1.45, head_norm=9.0, softness=0.02)
SETTING = Setting(optax.sgd(0.1), steps_at_a_time=4, batch_size=0, bounds=BOUNDS)


def features(params, x):
    return jnp.tanh(x @ params["body"])


def start(seed):
    rng = np.random.default_rng(seed)
    head = {"kernel": rng.normal(size=(4, NUM_CLASSES)), "bias": rng.normal(size=NUM_CLASSES)}
    return jax.tree.map(jnp.asarray, {"body": rng.normal(size=(5, 4)), "head": head})


def samples(seed):
    rng = np.random.default_rng((seed, 1))
    x, y = rng.normal(size=(17, 5)), np.arange(17) % NUM_CLASSES
    return Samples(x[:11], y[:11], x[11:], y[11:])


LEARNER = Learner(NUM_CLASSES, features, start, samples)
X, Y = jnp.asarray(samples(0).train_x), jnp.asarray(samples(0).train_y)


@functools.cache
def of(rule):
    return jax.jit(lambda params: gradient(LEARNER, SETTING, rule, params, X, Y, STRENGTH, LEVEL))(start(0))


def slope(function, direction, step=1e-5):
    """The slope of a function of the parameters along a direction, by differences."""

    def at(place):
        return function(jax.tree.map(lambda leaf, change: np.array(leaf + place * change), start(0), direction))

    return (at(step) - at(-step)) / (2 * step)


def used(params):
    """Features by NumPy, projected on their ball: some are outside."""
    feats = np.tanh(np.array(X) @ params["body"])
    norms = np.linalg.norm(feats, axis=1, keepdims=True)
    assert 0 < np.mean(norms > BOUNDS.feature_norm) < 1
    return feats * np.minimum(1, BOUNDS.feature_norm / norms)


def log_probabilities(params):
    logits = used(params) @ params["head"]["kernel"] + params["head"]["bias"]
    return logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))


def loss(params):
    return -log_probabilities(params)[np.arange(len(Y)), np.array(Y)].mean()


def oracle(quantity, params, added=0.0):
    feats = used(params)
    if quantity == "ncc":
        own = [feats[np.array(Y) == c] for c in range(NUM_CLASSES)]
        means, spreads = [each.mean(0) for each in own], [np.sum((each - each.mean(0)) ** 2, 1).mean() for each in own]
        return sum(
            (spreads[c] + spreads[k]) / (2 * (np.sum((means[c] - means[k]) ** 2) + added))
            for c in range(NUM_CLASSES)
            for k in range(NUM_CLASSES)
            if c != k
        )
    head = params["head"]
    problem = Problem(head["kernel"].T, head["bias"], feats, np.array(Y), np.ones(len(Y)))
    flatness = dense_flatness(softmax_cross_entropy, problem)
    return float(flatness.kappa if quantity == "kappa" else flatness.simplified)


def pushed_term(quantity, params):
    return STRENGTH * oracle(quantity, params, added=BOUNDS.softness * BOUNDS.feature_norm**2)


def held_term(quantity, params):
    return STRENGTH * (np.log(oracle(quantity, params)) - np.log(LEVEL)) ** 2


DIRECTIONS = [start(seed) for seed in (7, 8)]


@pytest.mark.parametrize("is_held", [False, True], ids=["pushed", "held"])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_gradient_of_an_arm_is_that_of_the_loss_and_of_its_term_by_differences(quantity, is_held):
    term = held_term if is_held else pushed_term
    for direction in DIRECTIONS:
        wanted = slope(lambda params: loss(params) + term(quantity, params), direction)
        np.testing.assert_allclose(optax.tree.vdot(of(Rule(quantity, is_held)), direction), wanted, rtol=2e-6)


def test_nothing_is_added_to_the_baseline():
    np.testing.assert_allclose(optax.tree.vdot(of(Rule()), DIRECTIONS[0]), slope(loss, DIRECTIONS[0]), rtol=1e-7)


def control_oracle(control, params):
    log_p = log_probabilities(params)
    return {
        "confidence_penalty": np.sum(np.exp(log_p) * log_p, axis=1).mean(),
        "label_smoothing": -log_p.mean() - loss(params),
        "weight_decay": 0.5 * sum(np.sum(leaf**2) for leaf in jax.tree.leaves(params)),
    }[control]


@pytest.mark.parametrize(("control", "quantity"), list(zip(CONTROLS, QUANTITIES, strict=True)))
def test_a_control_has_its_own_direction_and_the_size_of_the_term_it_stands_for(quantity, control):
    added = optax.tree.sub(of(Rule(quantity, control=control)), of(Rule()))
    term = optax.tree.sub(of(Rule(quantity)), of(Rule()))
    np.testing.assert_allclose(optax.tree.norm(added), optax.tree.norm(term), rtol=1e-12)
    ratios = [
        optax.tree.vdot(added, direction) / slope(lambda params: control_oracle(control, params), direction)
        for direction in DIRECTIONS
    ]
    assert ratios[0] > 0
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=1e-6)


@functools.partial(jax.jit, static_argnums=0)
def gradient_of_distance(quantity, head, feats, labels):
    def distance(arrays):
        value = measured(quantity, *arrays, labels, 5)
        return distance_from_level(value, jnp.asarray(1.0, value.dtype)), value

    return jax.grad(distance, has_aux=True)((head, feats))


@pytest.mark.parametrize("scale", [12.0, 60.0])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_the_gradient_of_the_logarithm_keeps_its_digits_in_the_collapsed_regime(quantity, scale):
    problem = collapsed_problem(5, 6, 15, scale)

    def gradients(dtype):
        of_type = problem.astype(dtype)
        return jax.device_get(gradient_of_distance(quantity, of_type.params, of_type.feats, problem.labels))

    (single, _), (double, value) = gradients(np.float32), gradients(np.float64)
    assert value < {"kappa": 1e-2, "simplified_kappa": 1e-1, "ncc": 1e-2}[quantity]
    if scale > 50 and quantity != "ncc":
        assert value < 1e-20
    single, double = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each)]) for each in (single, double))
    assert np.linalg.norm(double) > 1
    assert np.linalg.norm(single - double) < 1e-4 * np.linalg.norm(double)


def test_where_two_class_means_coincide_the_distance_from_a_level_of_collapse_is_not_finite():
    feats = np.array([[0.0], [2.0], [1.0], [1.0], [4.0], [5.0]])
    head, labels = {"kernel": np.ones((1, 3))}, np.arange(6) // 2
    distance = jax.jit(lambda feats: distance_from_level(measured("ncc", head, feats, labels, 3), 1.0))
    for scale in (1.0, 0.0):
        assert not np.isfinite(distance(scale * feats))


def test_each_seed_of_several_is_trained_as_it_would_be_alone():
    with jax.numpy_dtype_promotion("standard"):
        ends = [
            trainer.measure(trainer.advance(trainer.start(), 0, 0.1, 1.0))
            for trainer in (SeedTrainer(LEARNER, SETTING, Rule("kappa"), seeds) for seeds in ([3, 4, 5], [5]))
        ]
    for name, value in ends[1][0].items():
        np.testing.assert_allclose(ends[0][2][name], value, rtol=1e-12, err_msg=name)
    assert ends[0][0]["train_loss"] != ends[0][1]["train_loss"]


def test_what_is_measured_is_of_the_features_that_the_network_uses():
    trainer = SeedTrainer(LEARNER, SETTING, Rule(), [0])
    (values,) = trainer.measure(trainer.start())
    params = jax.tree.map(np.array, start(0))
    for name, quantity in {
        "relative_flatness": "kappa",
        "simplified_relative_flatness": "simplified_kappa",
        "ncc": "ncc",
    }.items():
        np.testing.assert_allclose(values[f"train_{name}"], oracle(quantity, params), rtol=1e-8)
    np.testing.assert_allclose(values["train_loss"], loss(params), rtol=1e-10)
    np.testing.assert_allclose(values["train_largest_feature"], BOUNDS.feature_norm, rtol=1e-12)


def test_images_held_out_are_none_of_those_trained_on():
    drawn = image_classification("digits", None, 50, 20, 8, 1).samples(3)
    assert drawn.train_x.shape == (50, 64)
    assert drawn.held_out_x.shape == (20, 64)
    assert not (drawn.train_x[:, None] == drawn.held_out_x[None]).all(axis=2).any()
    np.testing.assert_allclose([drawn.train_x.mean(), drawn.train_x.std()], [0, 1], atol=1e-5)
