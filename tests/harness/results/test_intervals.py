"""Intervals of means, and of paired differences."""

import math

import numpy as np
from scipy import stats

from harness.results import intervals


def test_an_interval_is_that_of_the_t_distribution():
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    got = intervals.interval(values.tolist())
    np.testing.assert_allclose([got.mean - got.half_width, got.mean + got.half_width], [low, high])
    assert np.isnan(intervals.interval([1.0]).half_width)


def test_a_gain_is_clear_if_its_interval_leaves_out_nothing():
    assert intervals.is_clear(intervals.Interval(-0.2, 0.1))
    assert not intervals.is_clear(intervals.Interval(0.1, 0.2))
    assert not intervals.is_clear(intervals.Interval(0.1, np.nan))


def test_an_effect_is_paired_by_seed_and_its_interval_that_of_students_t():
    found = intervals.effect([0.9, 0.8, 0.7], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(found.difference.mean, 0.3)
    np.testing.assert_allclose(found.difference.half_width, 4.302652729911275 * 0.1 / np.sqrt(3))
    np.testing.assert_allclose(found.standardised, 3.0)
    assert math.isnan(intervals.effect([0.9, math.nan], [0.5, 0.5]).difference.mean)
