"""The bounds of the interventions, and the ceilings that follow from them, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dense_flatness, random_problem, softmax_cross_entropy

from flatjax import neural_collapse, relative_flatness, simplified_relative_flatness
from harness.interventions.bounds import Bounds, softened_ncc

BOUNDS = Bounds(feature_norm=3.0, head_norm=2.0, softness=0.01)


def bounded(bounds, kernel, feats):
    return bounds.head({"kernel": kernel})["kernel"], bounds.features(feats)


def test_what_is_within_the_bounds_is_left_as_it_is_and_what_is_not_is_moved_straight_to_them():
    feats = jnp.array([[0.3, -0.4], [6.0, 8.0], [0.0, 0.0]])
    np.testing.assert_allclose(BOUNDS.features(feats), [[0.3, -0.4], [1.8, 2.4], [0.0, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(
        BOUNDS._replace(on_the_sphere=True).features(feats[:2]), [[1.8, -2.4], [1.8, 2.4]], rtol=1e-15
    )
    kernel = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(BOUNDS.head({"kernel": kernel})["kernel"], kernel * 0.4, rtol=1e-15)
    np.testing.assert_array_equal(BOUNDS.head({"kernel": 0.1 * kernel})["kernel"], 0.1 * kernel)


def test_features_that_are_all_zero_have_a_finite_gradient():
    gradient = jax.grad(lambda feats: jnp.sum(BOUNDS.features(feats)))(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(gradient, np.ones((2, 3)))


@pytest.mark.parametrize("d", [2, 3, 7])
def test_neither_kappa_nor_its_simplification_exceeds_its_ceiling_by_the_dense_hessian(d):
    shares = []
    for seed in range(30):
        problem = random_problem(d, 3, (4,), seed=seed)
        scale = 10 ** np.random.default_rng(seed).uniform(-1, 2)
        kernel, feats = bounded(BOUNDS, jnp.asarray(scale * problem.weight.T), jnp.asarray(scale * problem.feats))
        flatness = dense_flatness(
            softmax_cross_entropy, problem._replace(weight=np.array(kernel).T, feats=np.array(feats))
        )
        shares.append(
            (
                flatness.kappa / BOUNDS.ceiling("kappa", d),
                flatness.simplified / BOUNDS.ceiling("simplified_kappa", d),
            )
        )
    assert np.max(shares) <= 1 + 1e-12
    assert np.max(shares) > 0.5


def test_kappa_attains_its_ceiling_where_two_classes_of_opposite_rows_are_as_likely():
    row = np.sqrt(0.5) * BOUNDS.head_norm
    head = {"kernel": jnp.array([[row, -row, 0.0, 0.0], [0.0] * 4]), "bias": jnp.array([0.0, 0.0, -800.0, -800.0])}
    feats = jnp.array([[0.0, BOUNDS.feature_norm]] * 3)
    np.testing.assert_allclose(
        relative_flatness(head, feats, jnp.array([0, 1, 2])), BOUNDS.ceiling("kappa", 4), rtol=1e-14
    )


def test_the_simplified_measure_attains_its_ceiling_where_predictions_are_uniform():
    head = {"kernel": jnp.array([[1.0, -1.0, 1.0, -1.0], [0.0] * 4])}
    feats = jnp.array([[0.0, BOUNDS.feature_norm]] * 3)
    kappa = simplified_relative_flatness(BOUNDS.head(head), feats, jnp.array([0, 1, 2]))
    np.testing.assert_allclose(kappa, BOUNDS.ceiling("simplified_kappa", 4), rtol=1e-14)


def test_softened_collapse_is_collapse_at_softness_zero_and_at_its_ceiling_where_all_means_are_zero():
    rng = np.random.default_rng(1)
    feats, labels = jnp.asarray(rng.normal(size=(13, 3))), jnp.asarray(np.arange(13) % 4)
    head = {"kernel": jnp.ones((3, 4))}
    wanted = jax.jit(lambda feats, labels: neural_collapse(head, feats, labels, num_classes=4).ncc)(feats, labels)
    np.testing.assert_allclose(softened_ncc(feats, labels, 4, 0.0), wanted, rtol=1e-12)
    pairs = BOUNDS.feature_norm * jnp.array([[1.0, 0.0], [-1.0, 0.0]] * 4)
    at_most = softened_ncc(pairs, jnp.arange(8) // 2, 4, BOUNDS.softness * BOUNDS.feature_norm**2)
    np.testing.assert_allclose(at_most, BOUNDS.ceiling("ncc", 4), rtol=1e-14)


def test_a_class_of_one_sample_has_no_part_in_softened_collapse():
    feats, labels = jnp.array([[1.0], [2.0], [4.0], [5.0], [9.0]]), jnp.array([0, 0, 1, 1, 2])
    np.testing.assert_allclose(softened_ncc(feats, labels, 3, 0.5), 2 * 0.5 / (2 * 9.5), rtol=1e-14)
