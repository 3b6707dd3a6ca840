"""The benchmark of layers, at the smallest sizes."""

import json

import jax
import numpy as np
import pytest

import benchmark_layers
from harness.benchmarks.networks import perceptron, transformer


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


def test_an_early_and_a_late_layer_are_named():
    names = benchmark_layers.first_and_last_layer(transformer(depth=11, width=8, batch_size=2, context=4, vocab_size=5))
    assert names == ("blocks/0/attention/query/kernel", "blocks/10/down/kernel")


def test_a_probe_is_what_it_is_compared_as():
    network = perceptron(batch_size=16, width=8)
    args = (network.loss_fn, 4, jax.random.key(0))
    assert np.isfinite(benchmark_layers.trace_of(*args, network.params, network.batches[0]))
    assert np.isfinite(benchmark_layers.kappa_of(*args, "layers/0/kernel", network.params, network.batches[0]))


def test_curvlinops_is_measured_where_it_is_installed():
    pytest.importorskip("curvlinops")
    rows = benchmark_layers.beside_curvlinops(perceptron(batch_size=16, width=8), 2, 0, 0.1)
    assert [row["library"] for row in rows] == ["flatjax", "curvlinops"]


def test_draws_are_recorded_beside_the_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_layers, "DRAWN", {"small": lambda seed: perceptron(seed, batch_size=16, width=8)})
    benchmark_layers.gauss_newton(seconds=0, folder=tmp_path)
    rows = json.loads((tmp_path / "gauss-newton.json").read_text())["rows"]
    assert [row["function"] for row in rows[:2]] == ["gradient of the loss", "a draw"]
    assert rows[0]["gradients"] == 1
    assert all(row["seconds"] > 0 and row["temporary_bytes"] > 0 for row in rows)


def test_routes_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_layers, "NETWORKS", {"small": lambda seed: perceptron(seed, batch_size=16, width=12)})
    benchmark_layers.routes(relative_error=0.5, num_steps=2, seconds=0, folder=tmp_path)
    rows = json.loads((tmp_path / "routes.json").read_text())["rows"]
    assert [row["route"] for row in rows] == ["layerwise", "joint", "auto"]
    assert all(max(row["largest_relative_errors"]) < 1 for row in rows)
    assert all(min(row["over_the_better"]) >= 1 for row in rows if row["route"] != "auto")


def test_a_stack_is_measured_beside_the_same_blocks_one_by_one(tmp_path):
    benchmark_layers.stacked(depth=2, width=8, batch_size=2, context=4, num_probes=8, rounds=1, folder=tmp_path)
    *timings, difference = json.loads((tmp_path / "stacked.json").read_text())["rows"]
    assert [row["blocks"] for row in timings] == ["one by one", "stacked"]
    assert len(difference["differences_in_standard_errors"]) > 2
    assert max(map(abs, difference["differences_in_standard_errors"])) < 5
