"""The response to a dose."""

import numpy as np

from harness.interventions.arm_results import arm_results
from harness.interventions.arms import BASELINE, held
from harness.interventions.bounds import Bounds
from harness.interventions.dose_response import dose_response_table, dose_responses

from .cases import records


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
