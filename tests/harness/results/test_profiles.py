import json
import math

import numpy as np
import pytest

from flatjax.curvature.estimate import Estimate
from flatjax.run.records import RunFolder
from harness.results.profiles import draw_history, draw_profile, from_record, over_seeds, table

PROFILE = {
    "layers/0/kernel": Estimate(np.float32(-1.25), np.float32(0.5), np.int32(32)),
    "head/kernel": Estimate(np.float32(1000.0), np.float32(0.0), np.int32(0)),
}


def test_a_profile_comes_back_from_its_line_of_json_with_what_is_not_finite(tmp_path):
    profile = PROFILE | {"layers/1/kernel": Estimate(np.float32(math.nan), np.float32(math.inf), np.int32(4))}
    run = RunFolder(tmp_path, {}, resume=False)
    run.append({"profile": profile})

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    back = from_record(line["profile"])
    assert list(back) == list(profile)
    for path in profile:
        np.testing.assert_array_equal(back[path], profile[path])


def test_the_table_says_what_is_exact_and_what_is_estimated():
    _, hidden, head, direction = table(PROFILE).splitlines()
    assert hidden.split() == ["layers/0", "-1.25", "0.5", "32", "probes"]
    assert head.split() == ["head", "1000", "0", "exactly"]
    assert direction == "κ is relative flatness; larger is sharper."


def test_the_error_over_seeds_is_that_of_their_mean():
    profiles = [{"head": Estimate(np.float64(value), np.float64(9.0), np.int32(4))} for value in (1.0, 2.0, 6.0)]
    value, error, num_probes = over_seeds(profiles)["head"]
    # The deviations from 3 are −2, −1 and 3: a variance of 14/2 of one, and a third of that of the mean.
    np.testing.assert_allclose((value, error, num_probes), (3, math.sqrt(7 / 3), 12))
    assert over_seeds(profiles[:1]) is profiles[0]


@pytest.mark.parametrize("sign", [1, -1])
def test_profiles_are_drawn_whatever_their_signs(tmp_path, sign):
    later = {path: each._replace(value=sign * abs(each.value)) for path, each in PROFILE.items()}
    draw_profile(tmp_path / "profile.png", later, "title")
    accuracies = {"trained on": [0.1, 0.5], "held out": [0.1, 0.4]}
    draw_history(tmp_path / "history.png", [0, 1], [PROFILE, later], accuracies, "title")
    for name in ("profile", "history"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
