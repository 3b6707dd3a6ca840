"""The experiment, on a network small enough for a test, as its own process: as it is run, and as it is killed."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatjax
import layer_flatness
from harness.data import images

from .processes import metrics

SMALL = "--width 6 --depth 1 --steps 30 --measurements 4 --checkpoint-every 20 --num-train 200 --batch-size 20 "
SMALL += "--measure-on 20 --measure-batch 12 --num-probes 4 --max-probes 4 --learning-rate 1e-2 --warmup 1"
STEPS = [0, 1, 3, 10, 30]


@pytest.fixture(scope="module")
def both(processes):
    return processes("layer_flatness.py", SMALL)


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there in the midst of its measurements, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 3, folder, killed)
    return folder, killed, run.finish()


def test_a_run_leaves_its_configuration_metrics_checkpoints_figures_and_summary(uninterrupted):
    folder, _, output = uninterrupted
    run = folder / "run"
    assert json.loads((run / "config.json").read_text())["width"] == 6
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    assert [(record["seed"], record["step"]) for record in records] == [(0, k) for k in STEPS]
    assert set(records[0]) == {
        "seed", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "profile"
    }  # fmt: skip
    assert list(records[0]["profile"]) == ["layers/0/kernel", "head/kernel"]
    for figure in ("profile.png", "history.png"):
        assert (run / figure).read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "seed-0" / "30").is_dir()
    assert "layers/0" in output
    summary = json.loads((run / "summary.json").read_text())
    assert summary["profile"] == records[-1]["profile"]
    assert records[4]["train_loss"] < 0.8 * records[0]["train_loss"]


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 5
    both[1].start(killed, "--resume").finish()
    assert metrics(killed) == metrics(folder)


def test_the_profile_is_that_of_the_images_measured_on():
    """κ of the head at the first step, against the closed form in one batch; and the accuracy by hand."""
    sizes = {"width": 6, "depth": 1, "num_train": 50, "measure_on": 20, "measure_batch": 12, "num_probes": 4}
    config = layer_flatness.Config(**sizes, max_probes=4)
    train_set, test_set = images.load("digits", None, seed=0)
    train_set = train_set.some(config.num_train, 0)
    network, state = layer_flatness.initial(config, 0, train_set)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as experiments run
        measured = layer_flatness.measuring(config, network, 0, train_set, test_set)(state, 0)

    def forward(pixels):
        pixels = pixels.reshape(len(pixels), -1).astype(float)
        return np.asarray(model.features(jnp.asarray((pixels - mean) / deviation, jnp.float32)))

    mean, deviation = train_set.pixels.astype(float).mean(), train_set.pixels.astype(float).std()
    model = layer_flatness.nnx.merge(network.in_use, state["params"], state["rest"])
    chosen = train_set.some(config.measure_on, 0)
    head = state["params"]["head"]
    kappa = flatjax.relative_flatness(head, jnp.asarray(forward(chosen.pixels)), jnp.asarray(chosen.labels))
    np.testing.assert_allclose(measured["profile"]["head/kernel"].value, kappa, rtol=1e-5)
    logits = forward(test_set.pixels) @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    assert measured["test_accuracy"] == np.mean(logits.argmax(axis=1) == test_set.labels)


def test_batch_normalisation_is_of_the_batch_in_training_and_fixed_in_use():
    config = dataclasses.replace(layer_flatness.MODELS["resnet"][1], width=1)
    train_set, _ = images.load("digits", None, seed=0)
    network, state = layer_flatness.initial(config, 0, train_set)
    inputs = network.inputs(jnp.asarray(train_set.pixels[:6]))

    @partial(jax.jit, static_argnums=0)
    def change(graph, inputs):
        """Of the outputs for some images when others leave the batch."""
        model = layer_flatness.nnx.merge(graph, state["params"], state["rest"], copy=True)
        return jnp.max(jnp.abs(model(inputs)[:3] - model(inputs[:3])))

    assert change(network.in_use, inputs) < 1e-5 < change(network.in_training, inputs)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"model": "resnet", "depth": 3}, "18 layers"),
        ({"model": "vit", "width": 30}, "multiple of the 4 heads"),
        ({"steps": 0}, "--steps is 0"),
        ({"measure_on": -1}, "--measure-on is -1"),
    ],
)
def test_options_that_do_not_fit_are_an_error(options, wanted):
    with pytest.raises(SystemExit, match=wanted):
        layer_flatness.Config(**options)
