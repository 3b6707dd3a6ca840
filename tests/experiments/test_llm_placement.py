"""The experiment, small enough for a test, as its own process: as it is run, and as it is killed."""

import json

import pytest

import llm_placement
from harness.training.decoders import Penalty, network, penalty

from .processes import metrics, write_text

SMALL = "--vocab-size 270 --width 8 --depth 1 --heads 2 --context 8 --batch-size 4 --steps 4 --warm-up 2 --seeds 2 "
SMALL += "--arms plain head sam --head-strengths 1e-3 1e-2 --sam-strengths 0.1 --measure-on 8 --draws 2 "
SMALL += "--timing-seconds 0.01"


@pytest.fixture(scope="module")
def both(processes, tmp_path_factory):
    folder = write_text(tmp_path_factory.mktemp("text"), 25)
    return processes("llm_placement.py", f"{SMALL} --text {folder}")


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there in the midst of the second arm, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 4, folder, killed)
    return folder, killed, run.finish()


def records(folder):
    return [json.loads(line) for line in metrics(folder).splitlines()]


def test_a_run_leaves_a_record_of_every_network_a_table_a_figure_and_a_summary(uninterrupted):
    folder, _, output = uninterrupted
    found = {(r["phase"], r["arm"], r["strength"], r["seed"]) for r in records(folder) if r["phase"] != "timing"}
    tried = {"plain": (0.0,), "head": (1e-3, 1e-2), "sam": (0.1,)}
    assert {each for each in found if each[0] == "tuning"} == {
        ("tuning", arm, strength, 1000) for arm in tried for strength in tried[arm]
    }
    for arm in tried:
        assert sorted(each[3] for each in found if each[:2] == ("final", arm)) == [0, 1]
    assert [r["arm"] for r in records(folder) if r["phase"] == "timing"] == ["plain", "head", "sam"]
    run = folder / "run"
    assert (run / "table.txt").read_text() in output
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((run / "summary.json").read_text())) == {"plain", "head", "sam"}


def test_arms_of_a_seed_differ_in_what_is_added_to_the_loss_alone(uninterrupted):
    final = {(r["arm"], r["seed"]): r["held_out"] for r in records(uninterrupted[0]) if r["phase"] == "final"}
    assert len(set(final.values())) == len(final)
    for seed in (0, 1):
        assert abs(final["sam", seed] - final["plain", seed]) < 0.1


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 10
    both[1].start(killed, "--resume").finish()

    def networks(folder):
        return [line for line in metrics(folder).splitlines() if b"timing" not in line]

    assert networks(killed) == networks(folder)


def test_without_a_plain_arm_there_is_nothing_to_compare_with():
    with pytest.raises(SystemExit, match="wanted plain among them"):
        llm_placement.Config(arms=("sam",))


def test_arms_are_regularised_where_they_say():
    config = llm_placement.Config(depth=3)
    _, params = network(config.model, 0)
    kernels = {arm: penalty(params, config.layers(arm)) for arm in config.arms}
    assert kernels["head"] == Penalty(of_head=True)
    assert kernels["plain"] == kernels["sam"] == Penalty()
    assert {path.split("/")[1] for path in kernels["block"].kernels} == {"1"}
    assert len(kernels["blocks"].kernels) == 3 * len(kernels["block"].kernels) == 21
