"""The experiment, small enough for a test, as its own process: as it is run, and as it is killed."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import train_lm
from flatjax.diagnosis.sources import load_checkpoint
from flatjax.models import Decoder, DecoderConfig

from .processes import metrics, write_text

SMALL = "--vocab-size 270 --width 8 --depth 1 --heads 2 --context 8 --batch-size 4 --steps 12 --warm-up 2 "
SMALL += "--measure-every 4 --measure-on 8 --checkpoint-every 4 --held-out-share 0.3 --modules m3"


@pytest.fixture(scope="module")
def both(processes, tmp_path_factory):
    folder = write_text(tmp_path_factory.mktemp("text"), 4)
    return processes("train_lm.py", f"{SMALL} --text {folder}")


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there between two checkpoints, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 7, folder, killed)
    return folder, killed, run.finish()


def test_a_run_leaves_its_model_tokenizer_metrics_checkpoints_figure_and_summary(uninterrupted):
    folder, _, output = uninterrupted
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


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 13
    both[1].start(killed, "--resume").finish()
    assert metrics(killed) == metrics(folder)


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
