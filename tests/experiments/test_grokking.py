"""The main job, on a task small enough for a test, as its own process: as it is run, and as it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "grokking.py"
SMALL = "--modulus 7 --width 16 --heads 2 --train-share 0.8 --learning-rate 1e-2 --weight-decay 0.1 --max-steps 80 "
SMALL += "--measure-every 5 --checkpoint-every 10"


def start(folder: Path, *options: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL.split(), "--folder", str(folder), "--name", "run", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(folder: Path, *options: str) -> str:
    process = start(folder, *options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def metrics(folder: Path) -> bytes:
    file = folder / "run" / "metrics.jsonl"
    return file.read_bytes() if file.exists() else b""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(folder, "--seeds", "2")


def test_a_run_leaves_its_configuration_metrics_checkpoints_figure_and_summary(uninterrupted):
    folder, output = uninterrupted
    run = folder / "run"
    assert json.loads((run / "config.json").read_text())["modulus"] == 7
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    assert [(record["seed"], record["step"]) for record in records] == [(s, k) for s in (0, 1) for k in range(0, 85, 5)]
    for part in ("train", "held_out"):
        for name in ("loss", "accuracy", "relative_flatness", "simplified_relative_flatness", "nc1", "cdnv", "ncc"):
            assert f"{part}_{name}" in records[0]
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((run / "summary.json").read_text())) == {"0", "1"}
    assert (run / "checkpoints" / "seed-1" / "80").is_dir()
    assert "held-out accuracy passes 99 %" in output


def test_the_network_learns_what_it_is_trained_on(uninterrupted):
    records = [json.loads(line) for line in metrics(uninterrupted[0]).splitlines()]
    assert records[16]["train_loss"] < 0.5 * records[0]["train_loss"]


def test_a_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path):
    # Between two checkpoints of the first seed, and of the second.
    for lines_by_then in (4, 22):
        process = start(tmp_path, "--seeds", "2", "--resume")
        while metrics(tmp_path).count(b"\n") < lines_by_then:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(tmp_path, "--seeds", "2", "--resume")
    assert metrics(tmp_path) == metrics(uninterrupted[0])


def test_a_finished_run_is_neither_overwritten_nor_trained_again(uninterrupted):
    folder, _ = uninterrupted
    before = metrics(folder)
    process = start(folder, "--seeds", "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "--resume" in output
    finish(folder, "--seeds", "2", "--resume")
    assert metrics(folder) == before


def test_an_interval_that_a_run_could_not_resume_at_is_an_error(tmp_path):
    process = start(tmp_path, "--checkpoint-every", "12")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "multiple of --measure-every" in output
