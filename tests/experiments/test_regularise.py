"""The comparison, small enough for a test, as its own process: as it is run, and as it is killed; and its parts."""

import contextlib
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import dense_flatness, random_problem, softmax_cross_entropy
from scipy import stats

import flatjax
import regularise
from flatjax.models import MLP
from harness.data import few_labels
from harness.data.batches import all_batches
from harness.results import intervals
from harness.training.convolutions import convolve
from harness.training.regularisers import REGULARISERS
from harness.training.small_networks import PARTS, Programs, network

from .processes import finish, kill_when, metrics, starter

SMALL = "--models mlp --methods baseline sam kappa --width 6 --steps 12 --batch-size 20 --num-few 40 --num-wrong 60 "
SMALL += "--num-validation 30 --num-rates 2 --num-strengths 2 --tuning-seeds 2 --seeds 3 --timing-seconds 0.01"
CASES = [(task, method) for task in ("few", "wrong") for method in ("baseline", "sam", "kappa")]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return starter("regularise.py", SMALL, tmp_path_factory.mktemp("cache"))


@contextlib.contextmanager
def as_experiments_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def recorded(folder: Path) -> list[dict]:
    """All records but the timings, which no two runs share."""
    lines = metrics(folder).splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [record for record in records if record["phase"] != "timing"]


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, finish(start(folder))


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
    folder, output = uninterrupted
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert list(summary) == ["mlp-few", "mlp-wrong"]
    final = next(r for r in recorded(folder) if (r["phase"], r["task"], r["method"]) == ("final", "wrong", "kappa"))
    accuracies = [seed["test_accuracy"] for seed in final["seeds"].values()]
    np.testing.assert_allclose(summary["mlp-wrong"]["κ"]["accuracy"]["mean"], np.mean(accuracies))
    assert summary["mlp-wrong"]["baseline"]["gain"] is None
    assert summary["mlp-few"]["SAM"]["ratio"] > 1
    assert f"{100 * np.mean(accuracies):.2f} ±" in output
    assert (folder / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_resumes_to_the_same_metrics(start, uninterrupted, tmp_path):
    kill_when(start(tmp_path, "--resume"), lambda: len(recorded(tmp_path)) >= 17)  # in the midst of the second task
    finish(start(tmp_path, "--resume"))
    assert recorded(tmp_path) == recorded(uninterrupted[0])


def test_a_finished_run_is_not_trained_again(start, uninterrupted):
    folder, _ = uninterrupted
    before = metrics(folder)
    finish(start(folder, "--resume"))
    assert metrics(folder) == before


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"methods": ("sam",)}, "wanted baseline among them"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"num_strengths": 1}, "--num-strengths is 1"),
    ],
)
def test_options_that_do_not_fit_are_an_error(options, wanted):
    with pytest.raises(SystemExit, match=wanted):
        regularise.Config(**options)


# What is learned from.


def test_a_draw_has_each_class_alike_and_parts_that_share_no_image():
    labels = few_labels.digits().labels
    drawn = few_labels.draw(labels, few_labels.Task(100, 0.0), 300, seed=3)
    assert np.bincount(drawn.labels[drawn.parts["train"]]).tolist() == [10] * 10
    assert [len(drawn.parts[part]) for part in PARTS] == [100, 300, 797]
    assert len(np.unique(np.concatenate(list(drawn.parts.values())))) == 1197
    np.testing.assert_array_equal(drawn.labels, labels)


def test_so_many_labels_are_wrong_of_the_images_trained_on_and_no_others():
    labels = few_labels.digits().labels
    drawn = few_labels.draw(labels, few_labels.Task(500, 0.4), 300, seed=3)
    wrong = np.flatnonzero(drawn.labels != labels)
    assert len(wrong) == 200
    assert np.isin(wrong, drawn.parts["train"]).all()
    assert drawn.labels.min() == 0
    assert drawn.labels.max() == 9
    shifts = np.bincount((drawn.labels[wrong] - labels[wrong]) % 10, minlength=10)
    assert stats.chisquare(shifts[1:]).pvalue > 1e-3


def test_seeds_differ_in_what_is_trained_on_and_not_in_what_is_tested_on():
    labels = few_labels.digits().labels
    one, other = (few_labels.draw(labels, few_labels.Task(100, 0.0), 300, seed) for seed in (0, 1))
    assert len(np.intersect1d(one.parts["train"], other.parts["train"])) < 40
    np.testing.assert_array_equal(one.parts["test"], other.parts["test"])


def test_an_epoch_takes_each_image_once():
    train = np.arange(7, 27)
    order = all_batches(train, 5, 9, seed=0)
    assert order.shape == (9, 5)
    for epoch in (order[:4], order[4:8]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), train)
    assert (order[:4] != order[4:8]).any()


# What is minimised.


@pytest.mark.parametrize("name", ["label_smoothing", "confidence_penalty", "kappa", "simplified_kappa"])
def test_the_objective_is_cross_entropy_with_the_term_that_is_named(name):
    problem, strength = random_problem(4, 3, (6,)), 0.3
    logits = problem.feats @ problem.weight.T + problem.bias
    log_p = logits - np.log(np.sum(np.exp(logits), axis=1, keepdims=True))
    loss = -log_p[np.arange(6), problem.labels].mean()
    flatness = dense_flatness(softmax_cross_entropy, problem, weights=False)
    wanted = {
        "label_smoothing": (1 - strength) * loss - strength * log_p.mean(),
        "confidence_penalty": loss + strength * np.sum(np.exp(log_p) * log_p, axis=1).mean(),
        "kappa": loss + strength * flatness.kappa,
        "simplified_kappa": loss + strength * flatness.simplified,
    }[name]
    arrays = (problem.feats, problem.labels, strength)
    head = {name: jnp.asarray(value) for name, value in problem.params.items()}
    with as_experiments_run():
        got = REGULARISERS[name].objective(head, *map(jnp.asarray, arrays))
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


# How it is trained and measured.


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 8), (3, 2, 8), (3, 2, 5), (1, 2, 4)])
def test_a_convolution_by_products_is_the_convolution(size, stride, side):
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(size, size, 3, 4))
    padding, layout = [(size // 2, size // 2)] * 2, ("NHWC", "HWIO", "NHWC")
    wanted = jax.lax.conv_general_dilated(images, kernel, (stride, stride), padding, dimension_numbers=layout)
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), (stride, stride), padding)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def bench():
    """A perceptron's programs, and a maker of its trials."""
    config = regularise.Config(width=5, steps=6, batch_size=20, num_few=40, num_wrong=60, num_validation=30)
    digits = few_labels.digits()
    small = network(lambda rngs: MLP((64, 5, 10), rngs=rngs))
    programs = Programs(small, regularise.inputs("mlp", digits.pixels), config.steps)

    def make(rate: float, strength: float | None, seed: int, task: str = "few"):
        return regularise.trial(config, small, digits.labels, task, (rate, strength), seed)

    with as_experiments_run():
        yield programs, make


def trained(bench, method: str, rate: float, strength: float | None, end: int | None = None) -> dict:
    """The parameters of one network."""
    programs, make = bench
    state = programs.train(REGULARISERS[method], programs.stacked([make(rate, strength, 0)]), end)
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), state["params"])


@pytest.mark.parametrize("method", [name for name in REGULARISERS if name != "baseline"])
def test_a_method_of_no_strength_is_the_baseline(bench, method):
    one, other = (trained(bench, name, 0.1, 0.0) for name in (method, "baseline"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other)


def test_weight_decay_pulls_every_parameter_towards_nothing(bench):
    rate, strength = 0.1, 0.5
    start = bench[1](rate, strength, 0).start["params"]
    plain, decayed = (trained(bench, name, rate, strength, end=1) for name in ("baseline", "weight_decay"))
    jax.tree.map(
        lambda w, a, b: np.testing.assert_allclose(b - a, -rate * strength * w, atol=1e-6), start, plain, decayed
    )


@pytest.mark.parametrize("method", ["kappa", "simplified_kappa"])
def test_a_penalty_on_kappa_lowers_it(bench, method):
    programs, make = bench
    trials = [make(0.1, strength, 0) for strength in (0.0, 0.1)]
    plain, flat = programs.run(REGULARISERS[method], trials)
    assert flat["relative_flatness"] < 0.9 * plain["relative_flatness"]


def test_a_network_learns_the_same_whatever_others_are_trained_beside_it(bench):
    programs, make = bench
    trials = [make(0.1, 0.01, seed, task) for seed, task in ((0, "few"), (1, "wrong"), (2, "few"))]
    together = programs.run(REGULARISERS["kappa"], trials)
    assert programs.run(REGULARISERS["kappa"], trials[1:2]) == together[1:2]
    assert together[0] != together[1]


def test_what_is_measured_is_of_the_part_that_is_named(bench):
    programs, make = bench
    chosen = make(0.3, None, 0, "wrong")
    (measured,) = programs.run(REGULARISERS["baseline"], [chosen])
    state = programs.train(REGULARISERS["baseline"], programs.stacked([chosen]))
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[0]), state["params"])
    model = nnx.merge(programs.network.in_use, params, {})
    feats = np.asarray(model.features(programs.images))
    logits = feats @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])
    for place, part in enumerate(PARTS, start=1):
        right = (logits.argmax(axis=1) == chosen.labels)[chosen.parts == place]
        np.testing.assert_allclose(measured[f"{part}_accuracy"], right.mean(), rtol=1e-6)
    is_train = chosen.parts == 1
    kappa = flatjax.relative_flatness(params["head"], feats[is_train], chosen.labels[is_train])
    np.testing.assert_allclose(measured["relative_flatness"], kappa, rtol=1e-5)
    losses = flatjax.cross_entropy(jnp.asarray(logits[is_train]), jnp.asarray(chosen.labels[is_train]))
    np.testing.assert_allclose(measured["train_loss"], losses.mean(), rtol=1e-5)


def test_a_network_that_diverged_has_no_accuracy_and_its_setting_is_not_chosen(bench):
    programs, make = bench
    diverged, fine = programs.run(REGULARISERS["baseline"], [make(1e30, None, 0), make(1e-6, None, 0)])
    assert np.isnan(diverged["test_accuracy"])
    assert 0 <= fine["test_accuracy"] < 0.5
    tuned = [
        {"seeds": {"0": {"validation_accuracy": value}, "1": {"validation_accuracy": 1.0}}}
        for value in (None, 0.1, 0.3, 0.3)
    ]
    assert regularise.best_of(tuned) is tuned[2]


# How it is compared.


def test_an_interval_is_that_of_the_t_distribution():
    rng = np.random.default_rng(0)
    values = rng.normal(size=7)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    got = intervals.interval(values.tolist())
    np.testing.assert_allclose([got.mean - got.half_width, got.mean + got.half_width], [low, high])
    assert np.isnan(intervals.interval([1.0]).half_width)


def test_a_gain_is_clear_if_its_interval_leaves_out_nothing():
    assert intervals.is_clear(intervals.Interval(-0.2, 0.1))
    assert not intervals.is_clear(intervals.Interval(0.1, 0.2))
    assert not intervals.is_clear(intervals.Interval(0.1, np.nan))


def test_each_method_has_as_many_settings_and_strengths_span_three_decades():
    config = regularise.Config()
    for model, (method, regulariser) in itertools.product(("mlp", "resnet"), REGULARISERS.items()):
        tried = regularise.settings(config, model, method)
        assert len(set(tried)) == {"mlp": 35, "resnet": 12}[model]
        rates = {rate for rate, _ in tried}
        np.testing.assert_allclose([min(rates), max(rates)], config.grid(model)[:2])
        if regulariser.strengths:
            weakest, strongest = regulariser.strengths
            np.testing.assert_allclose(strongest / weakest, 1000)


def test_a_choice_at_the_end_of_what_was_tried_is_named():
    assert regularise.edge(0.1, (0.1, 0.1, 1.0, 1.0)) == "lowest"
    assert regularise.edge(1.0, (0.1, 0.1, 1.0, 1.0)) == "highest"
    assert regularise.edge(0.5, (0.1, 0.5, 1.0)) == ""
    assert regularise.edge(None, (None, None)) == ""
