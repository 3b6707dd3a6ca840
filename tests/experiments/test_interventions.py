"""The experiment, small enough for a test, as its own process: as it is run, and as it is killed."""

import json
import shutil

import pytest

import interventions
from harness.interventions.arms import BASELINE

from .processes import metrics


def test_an_arm_that_is_unplugged_from_the_start_is_the_baseline_to_the_last_bit():
    arm = interventions.pushed("kappa", -0.1, until=0)
    assert arm.rule_at(0) == BASELINE.rule


SMALL = "--modulus 5 --width 4 --max-steps 60 --measure-every 10 --checkpoint-every 20 --hold-since 20 --unplug-at 20 "
SMALL += (
    "--seeds 2 --quantities kappa --groups pushed held unplugged --kappa-levels 0.1 1 --kappa-strengths -0.00001 0.01"
)
ARMS = ["baseline", "κ held at 0.1", "κ held at 1", "against κ, λ = 1e-05", "towards κ, λ = 0.01"]
ARMS += ["against κ, λ = 1e-05, unplugged at 20"]


@pytest.fixture(scope="module")
def both(processes):
    return processes("interventions.py", SMALL)


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there between two checkpoints of the third arm, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 34, folder, killed)
    return folder, killed, run.finish()


def test_a_run_leaves_a_record_of_every_arm_and_seed_a_table_figures_and_a_summary(uninterrupted):
    folder, _, output = uninterrupted
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    assert list(dict.fromkeys(record["arm"] for record in records)) == ARMS
    for arm in ARMS:
        steps = [(r["seed"], r["step"]) for r in records if r["arm"] == arm]
        assert sorted(steps) == [(seed, step) for seed in (0, 1) for step in range(0, 70, 10)]
    run = folder / "run"
    assert (run / "table.txt").read_text() in output
    assert list(json.loads((run / "summary.json").read_text())) == [*ARMS, "dose_response"]
    for name in ("training-held", "training-pushed", "dose_response", "delay"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_all_arms_start_alike_and_a_held_one_leaves_the_baseline_when_it_is_held(uninterrupted):
    records = [json.loads(line) for line in metrics(uninterrupted[0]).splitlines()]
    of = {
        arm: {
            r["step"]: {k: v for k, v in r.items() if k != "arm"} for r in records if (r["arm"], r["seed"]) == (arm, 1)
        }
        for arm in ARMS
    }
    for arm in ARMS:
        assert of[arm][0] == of["baseline"][0]
    assert of["κ held at 1"][20] == of["baseline"][20]
    assert of["κ held at 1"][30] != of["baseline"][30]
    pushed, unplugged = of["against κ, λ = 1e-05"], of["against κ, λ = 1e-05, unplugged at 20"]
    assert pushed[20] == unplugged[20]
    assert pushed[30] != unplugged[30]


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted, tmp_path):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 42
    both[1].start(killed, "--resume").finish()
    assert metrics(killed) == metrics(folder)

    # Between the last lines of two seeds, the checkpoint after them not written.
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "run"
    (last,) = (run / "checkpoints").glob("*unplugged*/60")
    shutil.rmtree(last)
    (run / "metrics.jsonl").write_bytes(b"".join(metrics(tmp_path).splitlines(keepends=True)[:-1]))
    both[1].start(tmp_path, "--resume").finish()
    assert metrics(tmp_path) == metrics(folder)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [({"unplug_at": 60}, "--unplug-at is 60"), ({"batch_size": 5}, "--batch-size is for images")],
)
def test_options_that_do_not_fit_are_an_error(options, wanted):
    with pytest.raises(SystemExit, match=wanted):
        interventions.Config(**options)
