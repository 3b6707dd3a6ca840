"""The measures of small networks, held against dense ones; and the experiment, as it is run and as it is killed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Problem, dense_flatness, softmax_cross_entropy

import generalization_gap
from flatjax import cross_entropy
from flatjax.models import MLP
from harness.data import few_labels
from harness.training.small_networks import Trial, network

from .processes import metrics

SMALL = (
    "--rates 0.05 --batch-sizes 10 20 --widths 4 --decays 0 0.01 --noises 0 0.2 --seeds 1 --num-train 40 --steps 20 "
)
SMALL += "--num-probes 2 --num-lanczos-steps 3 --resamples 20"


@pytest.fixture(scope="module")
def both(processes):
    return processes("generalization_gap.py", SMALL)


@pytest.fixture(scope="module")
def uninterrupted(both, tmp_path_factory):
    """Its folder, what was there in the midst of the second group, and what it printed."""
    folder, killed = tmp_path_factory.mktemp("uninterrupted"), tmp_path_factory.mktemp("killed")
    run = both[0].start(folder)
    run.copy_when(lambda: metrics(folder).count(b"\n") >= 5, folder, killed)
    return folder, killed, run.finish()


def test_every_combination_is_trained_and_none_left_out(uninterrupted):
    folder, _, output = uninterrupted
    records = [json.loads(line) for line in metrics(folder).splitlines()]
    settings = [(r["batch_size"], r["weight_decay"], r["noise"]) for r in records]
    assert sorted(settings) == sorted(
        (batch, decay, noise) for batch in (10, 20) for decay in (0, 0.01) for noise in (0, 0.2)
    )
    for record in records:
        assert all(np.isfinite(record[name]) for name in generalization_gap.MEASURES)
        assert record["loss_gap"] == record["test_loss"] - record["train_loss"]
    assert "8 networks, 0 of them diverged" in output
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert set(summary["loss_gap"]) == set(generalization_gap.MEASURES)
    assert (folder / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_bits(both, uninterrupted):
    folder, killed, _ = uninterrupted
    assert metrics(killed).count(b"\n") < 8
    both[1].start(killed, "--resume").finish()
    assert metrics(killed) == metrics(folder)


def test_the_measures_of_a_network_are_those_of_its_dense_hessian():
    digits = few_labels.digits()
    x = jnp.asarray(digits.pixels[:, ::2, ::2].reshape(len(digits.labels), -1) / 255)
    of_width = network(lambda rngs: MLP((x.shape[1], 4, 4, 10), activation="tanh", rngs=rngs))
    config = generalization_gap.Config(num_train=40, steps=5, num_probes=3000, num_lanczos_steps=60)
    made = generalization_gap.trial(config, of_width, digits.labels, 10, (0.1, 0.0, 0.2, 3))
    start = jax.tree.map(lambda leaf: leaf.astype(float), made.start)
    state = {"params": jax.tree.map(lambda leaf: 1.5 * leaf, start["params"]), "rest": start["rest"]}
    made = Trial(start, *made[1:])
    with jax.numpy_dtype_promotion("standard"):
        found = generalization_gap.Measurement(config, of_width, x)(made, state)

    train, test = (np.flatnonzero(made.parts == place) for place in (1, 3))
    model = nnx.merge(of_width.in_use, state["params"])
    feats, logits = map(np.array, jax.jit(lambda x: (model.features(x), model(x)))(x))
    head = jax.tree.map(np.array, state["params"]["head"])
    problem = Problem(head["kernel"].T, head["bias"], feats[train], made.labels[train], np.ones(40))
    flatness = dense_flatness(softmax_cross_entropy, problem)
    for name, wanted in {
        "relative_flatness": flatness.kappa,
        "simplified_relative_flatness": flatness.simplified,
        "max_relative_flatness": flatness.maximal,
        "head_norm": np.sqrt(np.sum(head["kernel"] ** 2)),
        "test_error": np.mean(np.argmax(logits[test], axis=1) != made.labels[test]),
    }.items():
        np.testing.assert_allclose(found[name], wanted, rtol=1e-8, err_msg=name)

    flat, unravel = jax.flatten_util.ravel_pytree(state["params"])
    labels = jnp.asarray(made.labels[train])

    def loss(flat):
        return cross_entropy(nnx.merge(of_width.in_use, unravel(flat))(x[train]), labels).mean()

    hessian = np.array(jax.jit(jax.hessian(loss))(flat))
    np.testing.assert_allclose(found["largest_eigenvalue"], np.linalg.eigvalsh(hessian)[-1], rtol=1e-6)
    assert abs(found["hessian_trace"] - np.trace(hessian)) < 4 * found["hessian_trace_standard_error"]
    np.testing.assert_allclose(
        found["distance"], 0.5 * np.linalg.norm(jax.flatten_util.ravel_pytree(start["params"])[0])
    )


def test_a_diverged_network_has_no_error_that_looks_like_one():
    logits = jnp.array([[0.0, np.nan], [1.0, 0.0]])
    assert np.isnan(generalization_gap._error(logits, jnp.array([0, 0])))
