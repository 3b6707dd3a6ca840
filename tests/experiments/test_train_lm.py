"""A language model in training: what is minimised, on which devices, and the experiment as it is run and is killed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import train_lm
from flatjax import cross_entropy, layer_relative_flatness, relative_flatness
from flatjax.diagnosis.sources import load_checkpoint
from flatjax.models import Decoder, DecoderConfig
from harness.training.decoders import DecoderNetwork, Descent, Penalty, objective, one_step, penalty, placement, probed

from .processes import finish, kill_when, metrics, starter, write_text

CONFIG = DecoderConfig(vocab_size=16, width=8, depth=1, num_heads=2, inner_width=4)
DESCENT = Descent(steps=20, learning_rate=1e-2, warm_up=4, decay_share=0.25, weight_decay=0.1, clip=1.0)
WINDOWS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 6)))
KERNEL = "blocks/0/perceptron/up/kernel"
KEY = jax.random.key(3)


@functools.cache
def start():
    """In float64, with a tied head, and with a stream long enough that its normalisation is smooth."""
    model = Decoder(CONFIG, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    params["token_embedding"]["embedding"] *= 30
    return DecoderNetwork(graph), params


# What is minimised.


def test_kappa_by_the_way_is_relative_flatness_of_the_head():
    network, params = start()
    value, recorded = jax.jit(functools.partial(objective, network, Penalty()))(params, WINDOWS, KEY, 0.0)
    model = network.model(params)
    feats = model.features(WINDOWS[:, :-1])
    np.testing.assert_allclose(
        recorded["kappa"], relative_flatness(model.head_params(), feats, WINDOWS[:, 1:]), rtol=1e-10
    )
    wanted = cross_entropy(model(WINDOWS[:, :-1]), WINDOWS[:, 1:]).mean()
    np.testing.assert_allclose([value, recorded["loss"]], wanted, rtol=1e-10)


@functools.partial(jax.jit, static_argnums=0)
def probes(names, params, keys):
    """Values and gradients of the estimate on all windows."""
    network, _ = start()
    chosen = penalty(params, names, share=1.0)
    return jax.lax.map(
        lambda key: jax.value_and_grad(lambda params: probed(network, chosen, params, WINDOWS, key))(params), keys
    )


def test_the_mean_of_the_probes_is_kappa_of_the_kernel():
    network, params = start()
    exact = layer_relative_flatness(network.loss, params, WINDOWS, layer=KERNEL, method="weights").value
    values, _ = probes((KERNEL,), params, jax.random.split(KEY, 2000))
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert error < 0.05 * abs(exact)
    assert abs(np.mean(values) - exact) < 4 * error


def test_the_gradient_of_a_probe_is_that_by_differences_in_every_parameter():
    _, params = start()
    value_at = functools.partial(probes, ("blocks/0",))
    _, gradient = value_at(params, KEY[None])
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

    def at(step):
        return value_at(jax.tree.map(lambda leaf, change: leaf + step * change, params, direction), KEY[None])[0]

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, change: jnp.sum(g[0] * change), gradient, direction)))
    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5))[0] / 2e-5, rtol=1e-6)


def test_layers_are_named_by_what_is_at_or_above_their_kernels():
    _, params = start()
    assert penalty(params, ["head"]) == Penalty(of_head=True)
    assert penalty(params, [KERNEL]).kernels == (KERNEL,)
    of_block = penalty(params, ["blocks/0", "head", "blocks/0/attention"])
    assert of_block.of_head
    assert len(of_block.kernels) == 7
    with pytest.raises(SystemExit, match="--layers has 'blocks/1', wanted 'head', or what is at or above blocks/0"):
        penalty(params, ["blocks/1"])


def test_the_rate_warms_up_is_stable_and_decays_to_nothing():
    rates = np.array([DESCENT.rate()(step) for step in range(21)])
    np.testing.assert_allclose(rates[:4], 1e-2 * np.arange(4) / 4, atol=1e-9)
    np.testing.assert_allclose(rates[4:16], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(rates[15:], 1e-2 * np.arange(5, -1, -1) / 5, atol=1e-9)


# On several devices.


def steps_on(number, model_devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: number)
    network, params = start()
    chosen, optimizer = penalty(params, ["head", KERNEL], share=0.25), DESCENT.optimizer()
    placed = placement(model_devices, len(WINDOWS))
    state, shardings = placed.put(params, optimizer)
    step_of = jax.jit(functools.partial(one_step, network, chosen, optimizer), out_shardings=(shardings, None))
    recorded = []
    with jax.set_mesh(placed.mesh), jax.numpy_dtype_promotion("standard"):
        for step in range(3):
            state, values = step_of(state, placed.batch(np.asarray(WINDOWS)), jax.random.fold_in(KEY, step), 0.01)
            recorded.append(jax.device_get(values))
    return state, recorded


def test_a_training_step_on_8_devices_with_split_head_and_blocks_is_that_on_one(monkeypatch):
    """Though there are two sequences to probe for the four devices that share a batch."""
    state, recorded = steps_on(8, 2, monkeypatch)
    alone, recorded_alone = steps_on(1, 1, monkeypatch)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert len(split) == 3 * 8  # the embedding and seven kernels, each with its two moments
    assert all(len(leaf.sharding.device_set) == 8 for leaf in split)
    for one, other in zip(recorded, recorded_alone, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-9, err_msg=name)
    largest = jax.tree.map(lambda a, b: np.max(np.abs(np.array(a) - np.array(b))), state["params"], alone["params"])
    assert max(jax.tree.leaves(largest)) < 1e-8
    moved = optax.tree.norm(optax.tree.sub(jax.device_get(alone["params"]), start()[1]))
    assert moved > 1e-3


def test_a_training_step_with_split_head_and_blocks_is_exported_for_accelerators():
    network, params = start()
    chosen, optimizer = penalty(params, ["head", KERNEL], share=0.25), DESCENT.optimizer()
    placed = placement(2, len(WINDOWS))
    state, shardings = placed.put(params, optimizer)
    step = jax.jit(functools.partial(one_step, network, chosen, optimizer), out_shardings=(shardings, None))
    with jax.set_mesh(placed.mesh), jax.numpy_dtype_promotion("standard"):
        args = state, placed.batch(np.asarray(WINDOWS)), KEY, 0.01
        exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*args)
        _, here = step(*args)
        _, there = exported.call(*args)
    assert exported.nr_devices == 8
    np.testing.assert_allclose(there["kappa"], here["kappa"], rtol=1e-9)


def test_devices_that_do_not_divide_are_an_error():
    with pytest.raises(SystemExit, match="--model-devices is 3, wanted a divisor of the 8"):
        placement(3, 8)
    with pytest.raises(SystemExit, match="--batch-size is 6, wanted a multiple of the 4"):
        placement(2, 6)


# The experiment.

SMALL = "--vocab-size 270 --width 8 --depth 1 --heads 2 --context 8 --batch-size 4 --steps 12 --warm-up 2 "
SMALL += "--measure-every 4 --measure-on 8 --checkpoint-every 4 --held-out-share 0.3 --modules m3"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = write_text(tmp_path_factory.mktemp("text"), 4)
    return starter("train_lm.py", f"{SMALL} --text {folder}", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def uninterrupted(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(launch(folder))


def test_a_run_leaves_its_model_tokenizer_metrics_checkpoints_figure_and_summary(uninterrupted):
    folder, output = uninterrupted
    run = folder / "run"
    config = json.loads((run / "config.json").read_text())
    assert DecoderConfig(**config["model"]).vocab_size == config["vocab_size"] == 270
    assert all(name.startswith("m3/") for name in config["files"]["transfer"])
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    assert [record["step"] for record in records] == list(range(13))
    assert all({"loss", "kappa", "learning_rate"} <= set(record) for record in records[:-1])
    assert [record["step"] for record in records if "transfer_kappa" in record] == [0, 4, 8, 12]
    assert sorted(int(each.name) for each in (run / "checkpoints").iterdir()) == [0, 4, 8, 12]
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run / "summary.json").read_text())["held_out_loss"] < records[0]["held_out_loss"]
    assert (run / "tokenizer.json").exists()
    assert "modules held out: loss" in output


def test_a_checkpoint_of_a_run_is_read_without_its_optimizer(uninterrupted):
    run = uninterrupted[0] / "run"
    tokens = jnp.arange(10)[None]
    first, last = (load_checkpoint(run, step)(tokens) for step in (0, 12))
    assert first.shape == (1, 10, 270)
    fresh = Decoder(DecoderConfig(**json.loads((run / "config.json").read_text())["model"]), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(first, fresh(tokens), atol=1e-5)
    assert np.max(np.abs(first - last)) > 1e-3


def test_a_killed_run_resumes_to_the_same_bits(launch, uninterrupted, tmp_path):
    kill_when(launch(tmp_path), lambda: metrics(tmp_path).count(b"\n") >= 7)
    assert metrics(tmp_path).count(b"\n") < 13
    finish(launch(tmp_path, "--resume"))
    assert metrics(tmp_path) == metrics(uninterrupted[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "--heads is 3, wanted a divisor of --width, 8"),
        ({"heads": 8}, "--heads is 8 of --width 8, wanted heads of an even width"),
        ({"key_value_heads": 3}, "--key-value-heads is 3, wanted a divisor of --heads, 2"),
        ({"depth": 0}, "--depth is 0, wanted at least 1"),
        ({"vocab_size": 100_000}, "--vocab-size is 100000"),
        ({"context": 100_000}, "no window of --context 100000"),
        ({"strength": 1.0, "layers": ("blocks/9",)}, "--layers has 'blocks/9', wanted"),
        ({"batch_size": 800}, "--batch-size is 800, but the text has"),
        ({"batch_size": 12}, "--batch-size is 12, wanted a multiple of the 8 devices"),
        ({"measure_on": 1}, "has no batch of --batch-size 8"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_an_error_and_leave_nothing(options, message, tmp_path):
    (tmp_path / "text").mkdir()
    given = {
        "text": (write_text(tmp_path / "text", 4),), "folder": tmp_path / "runs", "vocab_size": 270, "width": 8,
        "depth": 1, "heads": 2, "context": 8, "batch_size": 8, "held_out_share": 0.3, "modules": ("m3",),
    }  # fmt: skip
    with pytest.raises(SystemExit, match=message):
        train_lm.main(train_lm.Config(**given | options))
    assert not (tmp_path / "runs").exists()
