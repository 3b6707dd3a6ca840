"""The comparison, small enough for a test, as its own process: as it is run, and as it is killed."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import regularise
from harness.training.regularisers import REGULARISERS

from .processes import metrics

SMALL = "--models mlp --methods baseline sam kappa --width 6 --steps 12 --batch-size 20 --num-few 40 --num-wrong 60 "
SMALL += "--num-validation 30 --mlp.num-rates 2 --mlp.num-strengths 2 --tuning-seeds 2 --seeds 3 --timing-seconds 0.01"
CASES = [(task, method) for task in ("few", "wrong") for method in ("baseline", "sam", "kappa")]


@pytest.fixture(scope="module")
def both(processes):
    return processes("regularise.py", SMALL)


def recorded(folder: Path) -> list[dict]:
    """All records but the timings, which no two runs share."""
    lines = metrics(folder).splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [record for record in records if record["phase"] != "timing"]


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there in the midst of the second task, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: len(recorded(folder)) >= 17, folder, killed)
    return folder, killed, run.finish()


def test_a_run_tries_each_method_in_as_many_settings_and_trains_the_best_anew(uninterrupted):
    records = recorded(uninterrupted[0])
    for task, method in CASES:
        of_case = [record for record in records if (record["task"], record["method"]) == (task, method)]
        *tuned, final = of_case
        assert [record["phase"] for record in of_case] == ["tuning"] * 4 + ["final"]
        assert all(list(record["seeds"]) == ["1000", "1001"] for record in tuned)
        assert list(final["seeds"]) == ["2000", "2001", "2002"]
        assert "test_accuracy" not in json.dumps(tuned)
        means = [np.mean([seed["validation_accuracy"] for seed in record["seeds"].values()]) for record in tuned]
        best = tuned[int(np.argmax(means))]
        assert all(final[key] == best[key] for key in ("learning_rate", "strength"))


def test_a_run_leaves_a_table_a_figure_and_a_summary(uninterrupted):
    folder, _, output = uninterrupted
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert list(summary) == ["mlp-few", "mlp-wrong"]
    final = next(r for r in recorded(folder) if (r["phase"], r["task"], r["method"]) == ("final", "wrong", "kappa"))
    accuracies = [seed["test_accuracy"] for seed in final["seeds"].values()]
    np.testing.assert_allclose(summary["mlp-wrong"]["κ"]["accuracy"]["mean"], np.mean(accuracies))
    assert summary["mlp-wrong"]["baseline"]["gain"] is None
    assert summary["mlp-few"]["SAM"]["ratio"] > 1
    assert f"{100 * np.mean(accuracies):.2f} ±" in output
    assert (folder / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_metrics(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert len(recorded(killed)) < 30
    both[1].start(killed, "--resume").finish()
    assert recorded(killed) == recorded(folder)


def test_a_finished_run_is_not_trained_again(both, uninterrupted):
    folder = uninterrupted[0]
    before = metrics(folder)
    both[1].start(folder, "--resume").finish()
    assert metrics(folder) == before


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"methods": ("sam",)}, "wanted baseline among them"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"mlp": dataclasses.replace(regularise.Config().mlp, num_strengths=1)}, "--num-strengths is 1"),
    ],
)
def test_options_that_do_not_fit_are_an_error(options, wanted):
    with pytest.raises(SystemExit, match=wanted):
        regularise.Config(**options)


def test_each_method_has_as_many_settings_and_strengths_span_three_decades():
    config = regularise.Config()
    for model, (method, regulariser) in itertools.product(("mlp", "resnet"), REGULARISERS.items()):
        tried = regularise.settings(config, model, method)
        assert len(set(tried)) == {"mlp": 35, "resnet": 12}[model]
        grid, rates = config.grid(model), {rate for rate, _ in tried}
        np.testing.assert_allclose([min(rates), max(rates)], [grid.lowest_rate, grid.highest_rate])
        if regulariser.strengths:
            weakest, strongest = regulariser.strengths
            np.testing.assert_allclose(strongest / weakest, 1000)


def test_a_choice_at_the_end_of_what_was_tried_is_named():
    assert regularise.edge(0.1, (0.1, 0.1, 1.0, 1.0)) == "lowest"
    assert regularise.edge(1.0, (0.1, 0.1, 1.0, 1.0)) == "highest"
    assert regularise.edge(0.5, (0.1, 0.5, 1.0)) == ""
    assert regularise.edge(None, (None, None)) == ""
