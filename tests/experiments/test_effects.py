"""What is made of the records of an intervention."""

import math

import numpy as np
import pytest

from harness.interventions.arm_results import arm_results, off_level_of, table
from harness.interventions.arms import BASELINE, Arm, Rule, controls, held, pushed
from harness.interventions.bounds import Bounds
from harness.interventions.dose_response import dose_response_table, dose_responses
from harness.interventions.outcomes import answers, delay_ratio, outcome
from harness.results.intervals import effect

NAMES = ["loss", "relative_flatness", "simplified_relative_flatness", "ncc", "softened_ncc"]


def records(held_out, train=None, arm="baseline", seed=0, every=10, **others):
    train = [1.0] * len(held_out) if train is None else train
    return [
        {"arm": arm, "seed": seed, "step": every * i, "train_accuracy": train[i], "held_out_accuracy": accuracy}
        | {f"train_{name}": 1.0 for name in NAMES}
        | {name: values[i] for name, values in others.items()}
        for i, accuracy in enumerate(held_out)
    ]


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


def test_an_effect_is_paired_by_seed_and_its_interval_that_of_students_t():
    found = effect([0.9, 0.8, 0.7], [0.5, 0.5, 0.5])
    np.testing.assert_allclose(found.difference.mean, 0.3)
    np.testing.assert_allclose(found.difference.half_width, 4.302652729911275 * 0.1 / np.sqrt(3))
    np.testing.assert_allclose(found.standardised, 3.0)
    assert math.isnan(effect([0.9, math.nan], [0.5, 0.5]).difference.mean)


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


def test_an_arm_does_what_it_says_between_its_steps_and_nothing_else():
    arm = pushed("kappa", -0.01, until=50)
    assert [arm.rule_at(step) for step in (0, 49, 50, 99)] == [Rule("kappa")] * 2 + [Rule()] * 2
    (arm,) = held("ncc", [3.0], 0.1, since=20)
    assert [arm.rule_at(step) for step in (0, 19, 20)] == [Rule(), Rule(), Rule("ncc", is_held=True)]


def results(arm, of_arm, of_baseline):
    arms = [BASELINE, arm]
    of_arms = {BASELINE.name: of_baseline, arm.name: of_arm}
    bounds = Bounds(feature_norm=2.0, head_norm=1.0, softness=0.1)
    return arm_results(arms, of_arms, num_classes=4, bounds=bounds, resolution=10)


def test_an_arm_that_does_not_fit_is_marked_and_one_at_its_ceiling_and_one_that_diverged():
    arm, plain = pushed("kappa", -0.01), [records([0.0, 1.0])] * 2
    cases = {
        "does not answer": records([0.0, 1.0], train=[0.5, 0.98]),
        "at its ceiling": records([0.0, 1.0], train_relative_flatness=[1.95, 1.99]),
        "NaN in 1 of 2, first at step 10": records([0.0, 1.0], train_loss=[1.0, None]),
    }
    for remark, of_seed in cases.items():
        result = results(arm, [of_seed, plain[0]], plain)[1]
        assert any(remark in each for each in result.remarks), remark
        assert remark in table(results(arm, [of_seed, plain[0]], plain))
    assert results(arm, plain, plain)[1].remarks == []


def test_a_held_arm_that_is_not_held_is_marked():
    (arm,) = held("kappa", [0.5], 0.1, since=10)
    on, off = (records([0.0] * 5, train_relative_flatness=[9.0, 9.0, 9.0, value, value]) for value in (0.49, 0.25))
    np.testing.assert_allclose(off_level_of(arm, [off]), 2.0)
    assert results(arm, [on, on], [on, on])[1].remarks == []
    assert results(arm, [off, off], [on, on])[1].remarks == ["not held: off by ×2"]


def test_a_dose_is_the_slope_over_the_levels_of_arms_that_answer():
    arms = [BASELINE, *held("kappa", [0.1, 1.0, 10.0, 100.0], 0.1, since=0)]
    last = {0.1: 0.99, 1.0: 0.995, 10.0: 1.0, 100.0: 0.0}
    of_arms = {BASELINE.name: [records([0.0, 0.0, 1.0], train_relative_flatness=[9.0, 8.0, 7.0])] * 2}
    for arm, late in zip(arms[1:], (1, 2, 4, 8), strict=True):
        train = [1.0] * 8 if arm.level < 100 else [0.5] * 8  # the last does not answer
        of_arms[arm.name] = [records([0.0] * late + [0.99] + [last[arm.level]] * (7 - late + 8), [*train, *train])] * 2
    found = arm_results(arms, of_arms, num_classes=4, bounds=Bounds(1.0, 1.0, 0.1), resolution=10)
    (dose,) = dose_responses(found, of_arms[BASELINE.name], 10)
    assert dose.levels == [0.1, 1.0, 10.0]
    np.testing.assert_allclose(dose.held_out.mean, 0.005, rtol=1e-9)
    np.testing.assert_allclose(np.exp(dose.log_delay.mean), 2, rtol=1e-9)
    assert dose.at_generalization == [7.0, 7.0]
    assert "2.00 [2.00, 2.00]" in dose_response_table([dose])


def test_controls_are_compared_with_the_arm_whose_size_they_have():
    arm = pushed("ncc", -0.1)
    of_size = controls(arm)
    assert [each.strength for each in of_size] == [0.1] * 3
    arms = [BASELINE, arm, *of_size]
    of_arms = {each.name: [records([0.0, 0.5 + 0.1 * place])] * 2 for place, each in enumerate(arms)}
    found = arm_results(arms, of_arms, num_classes=4, bounds=Bounds(1.0, 1.0, 0.1), resolution=10)
    differences = [each.difference.mean for each in found[1].beside_controls.values()]
    np.testing.assert_allclose(differences, [-0.05, -0.1, -0.15], atol=1e-12)
    assert isinstance(found[1].arm, Arm)
