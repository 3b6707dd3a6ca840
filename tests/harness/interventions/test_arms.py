"""An arm does what it says, when it says."""

from harness.interventions.arms import Rule, held, pushed


def test_an_arm_does_what_it_says_between_its_steps_and_nothing_else():
    arm = pushed("kappa", -0.01, until=50)
    assert [arm.rule_at(step) for step in (0, 49, 50, 99)] == [Rule("kappa")] * 2 + [Rule()] * 2
    (arm,) = held("ncc", [3.0], 0.1, since=20)
    assert [arm.rule_at(step) for step in (0, 19, 20)] == [Rule(), Rule(), Rule("ncc", is_held=True)]
