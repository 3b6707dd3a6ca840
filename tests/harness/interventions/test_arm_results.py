"""The table of arms marks what answers nothing."""

import numpy as np

from harness.interventions.arm_results import arm_results, off_level_of, table
from harness.interventions.arms import BASELINE, Arm, controls, held, pushed
from harness.interventions.bounds import Bounds

from .cases import records


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
