"""What is made of the records of an intervention."""

import math

import numpy as np
import pytest

from harness.interventions.outcomes import answers, delay_ratio, outcome

from .cases import records


def test_the_delay_is_from_fitting_to_generalizing_and_a_bound_where_it_never_came():
    came = outcome(records([0.1, 0.2, 0.5, 0.99, 1.0], train=[0.5, 1.0, 1.0, 1.0, 1.0]))
    assert (came.fitted, came.generalized, came.delay, came.is_censored) == (10, 30, 20, False)
    never = outcome(records([0.1, 0.2, 0.5], train=[0.5, 1.0, 1.0]))
    assert (never.delay, never.is_censored) == (10, True)
    assert outcome(records([0.1, 0.2], train=[0.5, 0.6])).delay is None


def test_a_network_whose_loss_is_not_finite_has_diverged_and_no_number_at_the_end():
    seed = outcome(records([0.1, 0.2, 0.3], train_loss=[1.0, None, 2.0]))
    assert seed.diverged == 10
    assert seed.delay is None
    assert math.isnan(seed.end["held_out_accuracy"])
    assert not answers([seed])
    assert outcome(records([0.1, 0.2], train_loss=[1.0, "inf"])).diverged == 10


def test_what_stands_at_the_end_is_a_median_that_one_spike_does_not_move():
    assert outcome(records([0.0] * 9 + [1.0, 1.0, 0.1, 1.0, 1.0])).end["held_out_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("late", "bound"), [((False, False), ""), ((True, False), "≥"), ((False, True), "≤"), ((True, True), "?")]
)
def test_a_ratio_of_delays_says_whether_it_is_a_bound(late, bound):
    def seeds(delay, is_late):
        end = 0.5 if is_late else 1.0
        return [outcome(records([0.0] * delay + [end], train=[1.0] * (delay + 1))) for _ in range(2)]

    ratio = delay_ratio(seeds(8, late[0]), seeds(2, late[1]), resolution=10)
    np.testing.assert_allclose(ratio.ratio, 4.0)
    assert ratio.bound == bound


def test_there_is_no_ratio_of_delays_where_a_network_never_fitted():
    fitted, never = outcome(records([0.0, 1.0])), outcome(records([0.0, 1.0], train=[0.0, 0.5]))
    assert delay_ratio([never, fitted], [fitted, fitted], resolution=10) is None
