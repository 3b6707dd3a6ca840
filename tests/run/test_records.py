import json
import math

import pytest

from flatjax.run.records import RunFolder

CONFIG = {"learning_rate": 0.1, "seed": 0}


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    RunFolder(tmp_path / "run", CONFIG, resume=False).append({"step": 0})
    with pytest.raises(SystemExit, match="--resume"):
        RunFolder(tmp_path / "run", CONFIG, resume=False)
    assert RunFolder(tmp_path / "run", CONFIG, resume=True).records == [{"step": 0}]


def test_a_run_does_not_resume_under_another_configuration(tmp_path):
    RunFolder(tmp_path, CONFIG, resume=False).append({"step": 0})
    with pytest.raises(SystemExit, match=r"learning_rate 0\.1 -> 0\.2"):
        RunFolder(tmp_path, CONFIG | {"learning_rate": 0.2}, resume=True)


def test_nothing_is_written_before_there_is_something_to_keep(tmp_path):
    run = RunFolder(tmp_path / "runs" / "run", CONFIG, resume=False)
    run.keep(lambda record: False)
    assert not (tmp_path / "runs").exists()
    (run.path / "checkpoint").touch()
    assert json.loads((run.folder / "config.json").read_text()) == CONFIG


def test_a_line_cut_short_by_a_kill_is_dropped_and_the_whole_ones_stay(tmp_path):
    run = RunFolder(tmp_path, CONFIG, resume=False)
    run.append({"step": 0, "loss": 0.1 + 0.2})
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 1, "lo')
    assert RunFolder(tmp_path, CONFIG, resume=True).records == [{"step": 0, "loss": 0.1 + 0.2}]
    assert file.read_bytes() == whole


def test_records_after_the_checkpoint_are_dropped_from_the_file_too(tmp_path):
    run = RunFolder(tmp_path, CONFIG, resume=False)
    for step in range(4):
        run.append({"step": step})
    run.keep(lambda record: record["step"] <= 1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.records == [{"step": 0}, {"step": 1}]


def test_what_is_not_finite_is_strict_json(tmp_path):
    run = RunFolder(tmp_path, CONFIG, resume=False)
    run.append({"nan": math.nan, "inf": math.inf})

    def refuse(constant):
        raise AssertionError(constant)

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"nan": None, "inf": "inf"}
