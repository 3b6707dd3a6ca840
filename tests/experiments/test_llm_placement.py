"""What is done to trained kernels, how arms are compared, and the experiment as it is run and is killed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_placement
from harness.llm_placement.perturbations import rounded, with_noise
from harness.llm_placement.tables import edge, quantities, row_of, table
from harness.training.decoders import Penalty, network, penalty

from .processes import finish, kill_when, metrics, starter, write_text

RNG = np.random.default_rng(0)
PARAMS = {
    "token_embedding": {"embedding": jnp.asarray(RNG.normal(size=(50, 40)))},
    "blocks": {0: {"up": {"kernel": jnp.asarray(RNG.normal(size=(40, 60))), "bias": jnp.ones(60)}}},
    "norm": {"scale": jnp.ones(40)},
}


def of(params):
    return params["token_embedding"]["embedding"], params["blocks"][0]["up"]["kernel"]


def test_noise_has_the_norm_asked_for_on_every_kernel_and_leaves_other_parameters():
    noisy = with_noise(PARAMS, jax.random.key(0), jnp.float64(0.2))
    for kernel, changed in zip(of(PARAMS), of(noisy), strict=True):
        ratio = np.linalg.norm(changed - kernel) / np.linalg.norm(kernel)
        assert abs(ratio - 0.2) < 0.2 * 4 / np.sqrt(2 * kernel.size)
    assert noisy["blocks"][0]["up"]["bias"] is PARAMS["blocks"][0]["up"]["bias"]
    assert noisy["norm"]["scale"] is PARAMS["norm"]["scale"]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_leaves_each_output_a_symmetric_grid_with_its_largest_weight_on_it(bits):
    levels = 2 ** (bits - 1) - 1
    for kernel, changed, axis in zip(of(PARAMS), of(rounded(PARAMS, bits)), (1, 0), strict=True):
        largest = np.max(np.abs(kernel), axis=axis, keepdims=True)
        multiples = changed / (largest / levels)
        np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-9)
        np.testing.assert_allclose(np.max(np.abs(multiples), axis=axis), levels)
        assert np.max(np.abs(changed - kernel) / (largest / levels)) <= 0.5 + 1e-9
        assert np.max(np.abs(changed - kernel)) > 0


def test_an_output_of_zeros_stays():
    params = {"kernel": jnp.array([[0.0, 1.0], [0.0, -3.0]])}
    np.testing.assert_array_equal(rounded({"head": params}, 4)["head"]["kernel"][:, 0], 0)


def record(seed, value):
    names = [*quantities([0.1]), "kappa_of_head", "kappa_of_blocks"]
    return {"strength": 0.1, "seed": seed} | dict.fromkeys(names, value)


def test_an_arm_is_compared_with_plain_seed_by_seed():
    plain = [record(seed, float(value)) for seed, value in enumerate((1, 5, 9))]
    better = [record(seed, value - 0.5 + 0.01 * seed) for seed, value in enumerate((1, 5, 9))]
    timing = {"seconds": 1e-3, "ratio": 1.0}
    rows = {
        "plain": row_of(quantities([0.1]), plain, None, [record(7, 2.0)], timing),
        "better": row_of(
            quantities([0.1]), better, plain, [record(7, 2.0) | {"strength": s} for s in (0.1, 1)], timing
        ),
    }
    difference = rows["better"]["less_plain"]["transfer"]
    np.testing.assert_allclose(difference.mean, -0.49)
    assert difference.half_width < 0.03 < rows["plain"]["means"]["transfer"].half_width
    lines = table(quantities([0.1]), rows, 3, 10)
    assert "-0.4900 ± 0.0248*" in lines
    assert "0.1 ↓" in lines
    assert "5 of 5 do" in lines


def test_a_network_that_diverged_is_not_left_out():
    plain = [record(seed, 1.0) for seed in range(3)]
    row = row_of(quantities([]), [*plain[:2], record(2, None)], plain, [], {"seconds": 1.0, "ratio": 1.0})
    assert np.isnan(row["means"]["held_out"].mean)
    assert np.isnan(row["less_plain"]["held_out"].mean)


def test_the_best_of_what_was_tried_points_to_what_was_not():
    assert [edge(value, (1, 2, 3)) for value in (1, 2, 3)] == [" ↓", "", " ↑"]
    assert edge(1, (1,)) == ""


# The experiment.

SMALL = "--vocab-size 270 --width 8 --depth 1 --heads 2 --context 8 --batch-size 4 --steps 4 --warm-up 2 --seeds 2 "
SMALL += "--arms plain head sam --head-strengths 1e-3 1e-2 --sam-strengths 0.1 --measure-on 8 --draws 2 "
SMALL += "--timing-seconds 0.01"


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = write_text(tmp_path_factory.mktemp("text"), 25)
    return starter("llm_placement.py", f"{SMALL} --text {folder}", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def uninterrupted(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(launch(folder))


def records(folder):
    return [json.loads(line) for line in metrics(folder).splitlines()]


def test_a_run_leaves_a_record_of_every_network_a_table_a_figure_and_a_summary(uninterrupted):
    folder, output = uninterrupted
    found = {(r["phase"], r["arm"], r["strength"], r["seed"]) for r in records(folder) if r["phase"] != "timing"}
    tried = {"plain": (0.0,), "head": (1e-3, 1e-2), "sam": (0.1,)}
    assert {each for each in found if each[0] == "tuning"} == {
        ("tuning", arm, strength, 1000) for arm in tried for strength in tried[arm]
    }
    for arm in tried:
        assert sorted(each[3] for each in found if each[:2] == ("final", arm)) == [0, 1]
    assert [r["arm"] for r in records(folder) if r["phase"] == "timing"] == ["plain", "head", "sam"]
    run = folder / "run"
    assert (run / "table.txt").read_text() in output
    assert (run / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert set(json.loads((run / "summary.json").read_text())) == {"plain", "head", "sam"}


def test_arms_of_a_seed_differ_in_what_is_added_to_the_loss_alone(uninterrupted):
    final = {(r["arm"], r["seed"]): r["held_out"] for r in records(uninterrupted[0]) if r["phase"] == "final"}
    assert len(set(final.values())) == len(final)
    for seed in (0, 1):
        assert abs(final["sam", seed] - final["plain", seed]) < 0.1


def test_a_killed_run_resumes_to_the_same_bits(launch, uninterrupted, tmp_path):
    kill_when(launch(tmp_path), lambda: metrics(tmp_path).count(b"\n") >= 4)
    assert metrics(tmp_path).count(b"\n") < 10
    finish(launch(tmp_path, "--resume"))

    def networks(folder):
        return [line for line in metrics(folder).splitlines() if b"timing" not in line]

    assert networks(tmp_path) == networks(uninterrupted[0])


def test_without_a_plain_arm_there_is_nothing_to_compare_with():
    with pytest.raises(SystemExit, match="wanted plain among them"):
        llm_placement.Config(arms=("sam",))


def test_arms_are_regularised_where_they_say():
    config = llm_placement.Config(depth=3)
    _, params = network(config.model, 0)
    kernels = {arm: penalty(params, config.layers(arm)) for arm in config.arms}
    assert kernels["head"] == Penalty(of_head=True)
    assert kernels["plain"] == kernels["sam"] == Penalty()
    assert {path.split("/")[1] for path in kernels["block"].kernels} == {"1"}
    assert len(kernels["blocks"].kernels) == 3 * len(kernels["block"].kernels) == 21
