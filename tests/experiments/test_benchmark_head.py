"""The benchmark measures what it says it does."""

import json
from functools import partial

import benchmark_head
import flatjax
from harness.benchmarks.calls import Call


def test_errors_are_those_of_float32_down_to_certainty():
    for certainty in (0, 60):
        assert 0 < benchmark_head.errors(200, certainty=certainty, seed=0, num_samples=8)["relative_error"] < 1e-4


def test_a_call_is_timed_the_first_time_later_and_jitted(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_head, "side_by_side", partial(benchmark_head.side_by_side, min_rounds=1))
    batch = benchmark_head.random_batch(4, 3, 8, seed=0)
    row = benchmark_head.cost_of("κ", Call(flatjax.relative_flatness, batch), seconds=0)
    assert row["first"] > 10 * row["later"]
    assert row["ratio"] == row["later"] / row["jitted"]["seconds"]
    unjitted = benchmark_head.cost_of("check", Call(flatjax.check_inputs, batch, can_be_jitted=False), seconds=0)
    assert unjitted["jitted"] is None
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_vocabulary_benchmark_writes_its_record(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_head, "side_by_side", partial(benchmark_head.side_by_side, min_rounds=1))
    monkeypatch.setattr(benchmark_head, "ERRORS_AT", ((1, 0), (200, 60)))
    benchmark_head.vocabulary(
        num_outputs=300, num_features=8, num_samples=16, tile_size=128, seconds=0, folder=tmp_path
    )
    record = json.loads((tmp_path / "vocabulary.json").read_text())
    assert [row["outputs"] for row in record["rows"] if "outputs" in row] == [1, 200, 300]
    ratios = {row["function"]: row["ratio"] for row in record["rows"] if "ratio" in row}
    assert ratios["cross-entropy"] == ratios["∇ tiled cross-entropy"] == 1
    assert len(ratios) == 9
    assert "temporary memory" in capsys.readouterr().out
