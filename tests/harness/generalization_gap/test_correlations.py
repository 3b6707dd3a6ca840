"""Rank correlations, and what is left of them given a third quantity."""

import math

import numpy as np
import pytest
from scipy import stats

from harness.generalization_gap.correlations import correlations, kendall, partial, spearman


def test_a_monotone_function_is_perfectly_correlated_and_its_mirror_image_perfectly_the_other_way():
    x = np.array([3.0, -1.0, 0.5, 10.0, 2.0])
    for coefficient in (kendall, spearman):
        np.testing.assert_allclose([coefficient(x, np.exp(x)), coefficient(x, -(x**3))], [1, -1])


@pytest.mark.parametrize("ties", [False, True])
def test_the_coefficients_are_those_of_the_definition(ties):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 23))
    x = np.round(x) if ties else x
    signs = [np.sign((x[i] - x[j]) * (y[i] - y[j])) for i in range(23) for j in range(i)]
    untied = [np.mean([each[i] != each[j] for i in range(23) for j in range(i)]) for each in (x, y)]
    np.testing.assert_allclose(kendall(x, y), np.mean(signs) / np.sqrt(untied[0] * untied[1]))
    np.testing.assert_allclose(spearman(x, y), np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])


def test_the_partial_spearman_is_the_correlation_of_what_linear_regression_of_ranks_leaves():
    rng = np.random.default_rng(1)
    z = rng.normal(size=60)
    x, y = z + rng.normal(size=60), -z + rng.normal(size=60)
    ranks = [stats.rankdata(each) for each in (x, y, z)]
    left = [each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    found = partial(spearman(x, y), spearman(x, z), spearman(y, z))
    np.testing.assert_allclose(found, np.corrcoef(*left)[0, 1], rtol=1e-12)


def test_what_goes_with_the_outcome_through_the_given_alone_has_no_partial_correlation():
    rng = np.random.default_rng(2)
    z = rng.normal(size=400)
    x, outcome = z + 0.5 * rng.normal(size=400), z + 0.5 * rng.normal(size=400)
    found = correlations({"x": x, "z": z}, outcome, "z", num_resamples=200, seed=0)
    assert found["x"]["spearman"].low > 0.6
    assert found["x"]["spearman_given"].low < 0 < found["x"]["spearman_given"].high
    assert set(found["z"]) == {"kendall", "spearman"}


def test_a_bootstrap_interval_holds_the_true_coefficient_about_as_often_as_it_says():
    rng, held, truth = np.random.default_rng(3), 0, 2 / np.pi * np.arcsin(0.5)
    for seed in range(60):
        x = rng.normal(size=60)
        y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=60)
        found = correlations({"x": x}, y, "x", num_resamples=100, seed=seed)["x"]["kendall"]
        held += found.low <= truth <= found.high
    assert 50 <= held < 60


def test_a_network_that_diverged_is_not_dropped_but_makes_its_correlations_nan():
    x, outcome = np.arange(10.0), np.arange(10.0) ** 2
    spoiled = np.where(np.arange(10) == 3, np.nan, x)
    found = correlations({"good": x, "bad": spoiled}, outcome, "good", num_resamples=10, seed=0)
    assert found["good"]["kendall"].value == pytest.approx(1)
    assert all(math.isnan(number) for kind in found["bad"].values() for number in kind)
