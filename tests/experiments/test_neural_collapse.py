"""The experiment, on a network small enough for a test, as its own process: as it is run, and as it is killed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import neural_collapse
from flatjax.layers.names import in_forward_order
from harness.data import images
from harness.training.classifiers import evaluating

from .processes import metrics

SMALL = "--models mlp --mlp-width 24 --mlp-depth 2 --mlp-epochs 40 --measurements 3 --checkpoint-every 3 "
SMALL += "--num-train 60 --batch-size 20 --measure-batch 400 --learning-rate 0.1"
EPOCHS = [0, 1, 6, 40]
WEIGHT_DECAY = 0.01
CASES = [("mlp", loss) for loss in ("cross_entropy", "squared_error")]


@pytest.fixture(scope="module")
def both(processes):
    return processes("neural_collapse.py", SMALL)


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there in the midst of the second loss, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 6, folder, killed)
    return folder, killed, run.finish()


def test_a_run_leaves_its_configuration_metrics_checkpoints_figure_and_summary(uninterrupted):
    folder, _, output = uninterrupted
    run = folder / "run"
    assert json.loads((run / "config.json").read_text())["mlp_width"] == 24
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    keys = [(record["model"], record["loss"], record["seed"], record["epoch"], record["step"]) for record in records]
    assert keys == [(*case, 0, epoch, 3 * epoch) for case in CASES for epoch in EPOCHS]
    for record in records:
        assert list(record["layers"]) == ["input", "layers/0", "layers/1"]
        assert record["nc1"] == record["layers"]["layers/1"]["nc1"]
        for name in ("train_accuracy", "test_cdnv", "nc2_equinorm_means", "nc3", "nc4", "squared_error_nc1"):
            assert isinstance(record[name], float)
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "mlp-squared_error-seed-0" / "120").is_dir()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["mlp-squared_error"]["0"]["last"] == records[-1]
    assert "perceptron, squared error" in output


def test_the_network_collapses_as_it_learns(uninterrupted):
    records = [json.loads(line) for line in metrics(uninterrupted[0]).splitlines()]
    for first, last in ((records[0], records[3]), (records[4], records[7])):
        assert last["train_loss"] < 0.8 * first["train_loss"]
        assert last["cdnv"] < 0.5 * first["cdnv"]
        assert last["layers"]["input"] == first["layers"]["input"]
    assert records[3]["train_accuracy"] == 1


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 8
    both[1].start(killed, "--resume").finish()
    assert metrics(killed) == metrics(folder)


@pytest.fixture(scope="module")
def measured():
    """The head, its features and labels, and what is measured of them, at the start."""
    config = neural_collapse.Config(mlp_width=12, mlp_depth=2, measure_batch=48)
    train_set, test_set = images.load("digits", None, seed=0)
    train_set, test_set = train_set.some(110, 0), test_set.some(48, 0)
    network, state = neural_collapse.initial(config, "mlp", 0, train_set, optax.sgd(0.1))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as experiments run
        parts = {"train": train_set, "test": test_set}
        record = evaluating(network, neural_collapse.squared_error, parts)(state)
        record |= neural_collapse.measuring(config, network, WEIGHT_DECAY, train_set, test_set)(state)
        model = network.model(state["params"], state["rest"])
        feats = np.asarray(model.features(network.inputs(jnp.asarray(train_set.pixels))), float)
    head = {name: np.asarray(value, float) for name, value in state["params"]["head"].items()}
    return head, feats, train_set.labels, record


def test_the_parts_sum_to_the_loss_trained_with_and_the_decay_of_the_head(measured):
    head, _, _, record = measured
    parts = sum(record[f"squared_error_{part}"] for part in ("nc1", "nc2_and_nc3", "perpendicular"))
    decay = sum(np.sum(value**2) for value in head.values()) * WEIGHT_DECAY / 2
    np.testing.assert_allclose(parts, record["train_loss"] + decay, rtol=1e-5)


def test_the_metrics_are_those_of_all_images_trained_on_at_once(measured):
    """In NumPy; in batches of 48, the last of 14."""
    head, feats, labels, record = measured
    means = np.array([feats[labels == c].mean(axis=0) for c in range(10)])
    spreads = np.array([np.mean(np.sum((feats[labels == c] - means[c]) ** 2, axis=1)) for c in range(10)])
    distances = np.sum((means[:, None] - means[None]) ** 2, axis=-1)
    others = ~np.eye(10, dtype=bool)
    cdnv = np.mean(((spreads[:, None] + spreads[None]) / (2 * np.where(others, distances, 1)))[others])
    np.testing.assert_allclose(record["cdnv"], cdnv, rtol=1e-5)
    nearest = np.argmin(np.sum((feats[:, None] - means[None]) ** 2, axis=-1), axis=1)
    chosen = np.argmax(feats @ head["kernel"] + head["bias"], axis=1)
    np.testing.assert_allclose(record["nc4"], np.mean(nearest != chosen), rtol=1e-6)
    np.testing.assert_allclose(record["train_accuracy"], np.mean(chosen == labels), rtol=1e-6)


@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_the_last_layer_is_what_enters_the_head(model):
    config = neural_collapse.Config(mlp_width=5, resnet_width=1)
    train_set, _ = images.load("digits", None, seed=0)
    network, state = neural_collapse.initial(config, model, 0, train_set, optax.sgd(0.1))
    inputs = network.inputs(jnp.asarray(train_set.pixels[:3]))

    @jax.jit
    def features(state, inputs):
        model = network.model(state["params"], state["rest"])
        return neural_collapse.layer_features(model, inputs), model.features(inputs)

    by_layer, wanted = features(state, inputs)
    np.testing.assert_array_equal(by_layer[in_forward_order(list(by_layer))[-1]], wanted)
    assert len(by_layer) == {"mlp": 5, "resnet": 11}[model]


@pytest.mark.parametrize("name", ["mlp_epochs", "measurements", "batch_size"])
def test_options_that_do_not_fit_are_an_error(name):
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} is 0, wanted at least 1"):
        neural_collapse.Config(**{name: 0})
