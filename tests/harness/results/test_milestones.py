import math

import pytest

from harness.results.milestones import first_step_at_least, halfway_down


def test_the_first_step_at_a_threshold_is_the_first_not_the_last():
    assert first_step_at_least([0, 10, 20, 30], [0.1, 0.99, 0.5, 1.0], 0.99) == 10
    assert first_step_at_least([0, 10], [0.1, 0.2], 0.99) is None


def test_a_straight_fall_on_a_log_axis_is_halfway_at_its_middle():
    steps = list(range(0, 110, 10))
    assert halfway_down(steps, [math.exp(-step) for step in steps]) == 50


def test_halfway_is_after_the_peak_not_on_the_way_up_to_it():
    assert halfway_down([0, 1, 2, 3, 4], [1e-3, 1e-1, 1e3, 1e2, 1e-3]) == 4


def test_a_later_spike_is_not_the_peak():
    values = [1.0, 100.0, 10.0, 1.0, 1e4, 0.01]
    assert halfway_down(list(range(6)), values, peak_by=2) == 3
    assert halfway_down(list(range(6)), values) == 5


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [5.0, 5.0]])
def test_what_does_not_come_down_has_no_halfway(values):
    assert halfway_down(list(range(len(values))), values) is None


def test_values_that_are_not_finite_are_passed_over():
    assert halfway_down([0, 1, 2, 3, 4], [math.inf, math.nan, 100.0, 10.0, 1.0]) == 3
    assert halfway_down([0, 1], [math.nan, math.inf]) is None
