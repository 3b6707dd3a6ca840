"""The main job, on a task small enough for a test, as its own process: as it is run, and as it is killed."""

import json

import pytest

import grokking

from .processes import metrics

SMALL = "--modulus 6 --width 16 --heads 2 --train-share 0.5 --learning-rate 1e-2 --weight-decay 0.1 "
SMALL += "--max-steps 80 --measure-every 10 --checkpoint-every 20 --seeds 3"


@pytest.fixture(scope="module")
def both(processes):
    return processes("grokking.py", SMALL)


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there between two checkpoints of the second seed, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 13, folder, killed)
    return folder, killed, run.finish()


def test_a_run_leaves_its_configuration_metrics_checkpoints_figure_and_summary(uninterrupted):
    folder, _, output = uninterrupted
    run = folder / "run"
    assert json.loads((run / "config.json").read_text())["modulus"] == 6
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    assert [(record["seed"], record["step"]) for record in records] == [
        (s, k) for s in (0, 1, 2) for k in range(0, 90, 10)
    ]
    for part in ("train", "held_out"):
        for name in ("loss", "accuracy", "relative_flatness", "simplified_relative_flatness", "nc1", "cdnv", "ncc"):
            assert f"{part}_{name}" in records[0]
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((run / "summary.json").read_text())) == {"0", "1", "2"}
    assert (run / "checkpoints" / "seed-1" / "80").is_dir()
    assert "held-out accuracy passes 99 %" in output


def test_the_network_learns_what_it_is_trained_on(uninterrupted):
    records = [json.loads(line) for line in metrics(uninterrupted[0]).splitlines()]
    assert records[8]["train_loss"] < 0.5 * records[0]["train_loss"]


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 18
    both[1].start(killed, "--resume").finish()
    assert metrics(killed) == metrics(folder)


def test_a_finished_run_is_neither_overwritten_nor_trained_again(both, uninterrupted):
    folder = uninterrupted[0]
    before = metrics(folder)
    assert "--resume" in both[0].start(folder).fail()
    both[0].start(folder, "--resume").finish()
    assert metrics(folder) == before


def test_an_interval_that_a_run_could_not_resume_at_is_an_error():
    with pytest.raises(SystemExit, match="multiple of --measure-every"):
        grokking.Config(measure_every=10, checkpoint_every=12)


def curve(step: int) -> dict:
    """A record of a network that fits at step 10 and generalizes at 100. NCC falls before κ, which ends on a spike."""
    kappa, ncc = (1.0 if step >= 90 else 100.0), (1.0 if step >= 40 else 100.0)
    kappa = 50.0 if step == 200 else kappa
    parts = ("train", "held_out")
    return {"step": step, "train_accuracy": float(step >= 10), "held_out_accuracy": float(step >= 100)} | {
        f"{part}_{name}": value for part in parts for name, value in (("relative_flatness", kappa), ("ncc", ncc))
    }


def test_the_summary_tells_the_median_after_generalization_from_the_last_value():
    summary = grokking.summarise([curve(step) for step in range(0, 210, 10)])
    assert summary["median_after_generalization"]["train_relative_flatness"] == 1
    assert summary["last"]["train_relative_flatness"] == 50
    assert summary["held_out_accuracy_99"] == 100


def test_the_conclusion_is_one_sentence_of_shares_of_the_way_to_generalization():
    config = grokking.Config()
    summary = grokking.summarise([curve(step) for step in range(0, 210, 10)])
    sentence = "ollapse (NCC) was half-way down at 40 % of the way to generalization, κ at 90 %."
    assert grokking.conclusion(config, [summary]) == f"C{sentence}"
    assert grokking.conclusion(config, [summary] * 3) == f"In the median over 3 seeds, c{sentence}"
    never = grokking.summarise([curve(step) for step in range(0, 90, 10)])
    assert grokking.conclusion(config, [summary, never]).startswith("In the median over the 1 of 2 that generalized,")
    assert "No network generalized" in grokking.conclusion(config, [never])
    assert "40 %" in grokking.report(config, {"0": summary}).splitlines()[-1]


def test_the_end_is_a_measurement_and_known_once_the_network_generalizes():
    config = grokking.Config(max_steps=1001, measure_every=10, checkpoint_every=10, train_on=0.55)
    assert grokking.last_step(config, [curve(0)]) == 1010
    assert grokking.last_step(config, [curve(step) for step in range(0, 110, 10)]) == 160
