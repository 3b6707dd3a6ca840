import json
import math

import numpy as np
import pytest
from harness.profiles import draw_history, draw_profile, from_record, in_forward_order, over_seeds, table, to_record
from harness.progress import Progress
from harness.runs import RunFolder

from flatjax.curvature.estimate import Estimate

PROFILE = {
    "layers/0/kernel": Estimate(np.float32(-1.25), np.float32(0.5), np.int32(32)),
    "head/kernel": Estimate(np.float32(1000.0), np.float32(0.0), np.int32(0)),
}


@pytest.mark.parametrize(
    "paths",
    [
        ["layers/0/kernel", "layers/2/kernel", "layers/10/kernel", "head/kernel"],
        ["stem/kernel", "blocks/0/first/kernel", "blocks/0/second/kernel", "blocks/0/shortcut/kernel", "head/kernel"],
        ["patch_embedding/kernel", *(f"blocks/0/attention/{name}/kernel" for name in ("query", "key", "value", "out")),
         "blocks/0/up/kernel", "blocks/0/down/kernel", "blocks/1/attention/query/kernel", "head/kernel"],
    ],
)  # fmt: skip
def test_layers_go_from_the_input_to_the_head(paths):
    assert in_forward_order(sorted(paths)) == paths


def test_a_profile_comes_back_from_its_line_of_json_with_what_is_not_finite(tmp_path):
    profile = PROFILE | {"layers/1/kernel": Estimate(np.float32(math.nan), np.float32(math.inf), np.int32(4))}
    run = RunFolder(tmp_path, {}, resume=False)
    run.append({"profile": to_record(profile)})

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


def test_the_time_left_is_that_of_each_kind_of_work_at_its_median_pace(monkeypatch):
    now = iter([0.0, 2.0, 12.0, 14.0, 30.0, 31.0])
    monkeypatch.setattr("harness.progress.time.monotonic", lambda: next(now))
    with Progress("work", {"step": 10, "measurement": 3}) as progress:
        progress.done("step", 2)
        assert progress.seconds_left == 8 * 1
        progress.done("measurement")
        assert progress.seconds_left == 8 * 1 + 2 * 10
        progress.done("step", 1)
        progress.done("measurement")
        progress.done("step", 1)
        # Paces of a step 1, 2 and 1; of a measurement 10 and 16.
        assert progress.seconds_left == 6 * 1 + 1 * 13


def test_a_bar_has_one_total_of_all_kinds_and_counts_what_was_done_before(monkeypatch):
    now = iter([0.0, 5.0, 6.0, 26.0])
    monkeypatch.setattr("harness.progress.time.monotonic", lambda: next(now))
    with Progress("work", {"step": 10, "measurement": 3}, {"step": 1.0, "measurement": 10.0}) as progress:
        progress.were_done({"step": 6, "measurement": 1})
        assert progress.share_done == 16 / 40
        assert progress.seconds_left == 0  # nothing is known of
        progress.done("step", 2)
        assert progress.share_done == 18 / 40
        # A step takes half a second, and a measurement as long as ten steps until one is seen.
        assert progress.seconds_left == 2 * 0.5 + 2 * 5
        progress.done("measurement")
        assert progress.seconds_left == 2 * 0.5 + 1 * 20
