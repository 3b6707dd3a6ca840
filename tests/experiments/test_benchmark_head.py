"""The benchmark measures what it says it does."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_problem

import benchmark_head
import flatjax
from harness.benchmarks.baselines import cross_entropy, tiled_cross_entropy, weight_by_weight
from harness.benchmarks.calls import Call
from harness.benchmarks.growth import Growth, draw_growth, exponent


@pytest.mark.parametrize("tile_size", [1, 5, 36, 37])
def test_the_tiled_loss_is_the_loss_and_has_its_gradient(tile_size):
    batch = benchmark_head.random_batch(37, 5, 11, seed=0)
    got = benchmark_head.value_and_gradient(partial(tiled_cross_entropy, tile_size=tile_size))(*batch)
    want = benchmark_head.value_and_gradient(cross_entropy)(*batch)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


def test_the_published_algorithm_gives_kappa():
    problem = random_problem(3, 4, (7,))
    params, feats, labels = jax.tree.map(jnp.asarray, (problem.params, problem.feats, problem.labels))
    want = flatjax.relative_flatness(params, feats, labels)
    np.testing.assert_allclose(weight_by_weight(params, feats, labels), want, rtol=1e-12)


def test_errors_are_those_of_float32_down_to_certainty():
    for certainty in (0, 60):
        assert 0 < benchmark_head.errors(200, certainty=certainty, seed=0, num_samples=8)["relative_error"] < 1e-4


def test_temporary_memory_of_a_product_is_that_of_its_intermediate_results():
    batch = {"kernel": jnp.ones((3, 1000)), "bias": jnp.zeros(1000)}, jnp.ones((500, 3)), jnp.zeros(500, int)
    assert benchmark_head.temporary_memory(cross_entropy, batch) >= 500 * 1000 * 8


def test_the_exponent_of_a_power_law_and_its_standard_error():
    sizes = [10, 100, 1000]
    np.testing.assert_allclose(exponent(sizes, [3 * n**1.5 for n in sizes]), (1.5, 0), atol=1e-12)
    # Of log10 cost 0, 1, 3 at log10 size 1, 2, 3: the slope is 3/2, residuals 1/6, −1/3, 1/6.
    np.testing.assert_allclose(exponent(sizes, [1, 10, 1000]), (1.5, np.sqrt(1 / 6 / 2)), rtol=1e-12)
    np.testing.assert_allclose(exponent([10, 100], [1, 10]), (1, np.nan))


def test_growth_is_drawn(tmp_path):
    growth = Growth("n", "seconds", [1, 10], {"ours": [1.0, 2.0]})
    draw_growth(tmp_path / "growth.png", [growth, growth], "title")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


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
    benchmark_head.vocabulary(
        num_outputs=300, num_features=8, num_samples=16, tile_size=128, seconds=0, folder=tmp_path
    )
    record = json.loads((tmp_path / "vocabulary.json").read_text())
    ratios = {row["function"]: row["ratio"] for row in record["rows"] if "ratio" in row}
    assert ratios["cross-entropy"] == ratios["∇ tiled cross-entropy"] == 1
    assert len(ratios) == 9
    assert "temporary memory" in capsys.readouterr().out
