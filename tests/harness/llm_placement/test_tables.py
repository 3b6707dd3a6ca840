"""Arms are compared with the plain one, seed by seed."""

import numpy as np

from harness.llm_placement.tables import edge, quantities, row_of, table


def record(seed, value):
    names = [*quantities([0.1]), "kappa_of_head", "kappa_of_blocks"]
    return {"strength": 0.1, "seed": seed} | dict.fromkeys(names, value)


def test_an_arm_is_compared_with_plain_seed_by_seed():
    plain = [record(seed, float(value)) for seed, value in enumerate((1, 5, 9))]
    better = [record(seed, value - 0.5 + 0.01 * seed) for seed, value in enumerate((1, 5, 9))]
    timing = {"seconds": 1e-3, "ratio": 1.0}
    rows = {
        "plain": row_of(quantities([0.1]), plain, None, [record(7, 2.0)], timing),
        "better": row_of(
            quantities([0.1]), better, plain, [record(7, 2.0) | {"strength": s} for s in (0.1, 1)], timing
        ),
    }
    difference = rows["better"]["less_plain"]["transfer"]
    np.testing.assert_allclose(difference.mean, -0.49)
    assert difference.half_width < 0.03 < rows["plain"]["means"]["transfer"].half_width
    lines = table(quantities([0.1]), rows, 3, 10)
    assert "-0.4900 ± 0.0248*" in lines
    assert "0.1 ↓" in lines
    assert "5 of 5 do" in lines


def test_a_network_that_diverged_is_not_left_out():
    plain = [record(seed, 1.0) for seed in range(3)]
    row = row_of(quantities([]), [*plain[:2], record(2, None)], plain, [], {"seconds": 1.0, "ratio": 1.0})
    assert np.isnan(row["means"]["held_out"].mean)
    assert np.isnan(row["less_plain"]["held_out"].mean)


def test_the_best_of_what_was_tried_points_to_what_was_not():
    assert [edge(value, (1, 2, 3)) for value in (1, 2, 3)] == [" ↓", "", " ↑"]
    assert edge(1, (1,)) == ""
