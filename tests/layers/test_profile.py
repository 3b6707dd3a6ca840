"""The profile of all layers against the exact κ of each, batch by batch."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax import flatness_profile
from flatjax.layers import profile
from flatjax.layers.curvature import LayerCurvature, joint_probes
from flatjax.layers.kernels import Layer, find_layers
from flatjax.layers.routes import Prober

from .cases import CASES, dense_kappa, dense_profile, normalised, perceptron, perceptron_loss

SIZES = (2, 2, 5)
"""Of the batches: two of one size, for which one program is compiled, and another that weighs more."""


def batches_of(case, sizes=SIZES):
    ends = np.cumsum(sizes)
    return [
        tuple(each[end - size : end] for each in case.batch) for size, end in zip(sizes, ends, strict=True)
    ]  # fmt: skip


def exact_profile(case):
    profiles = [dense_profile(case._replace(batch=batch)) for batch in batches_of(case)]
    return {path: np.average([each[path] for each in profiles], weights=SIZES) for path in profiles[0]}


def large_perceptron():
    """With more directions a layer than probes are drawn here."""
    return perceptron(num_samples=9, sizes=(12, 20, 16, 3), seed=4)


def wide_perceptron():
    """Whose hidden layers are probed, as no exact route takes fewer products than some fifty probes."""
    return perceptron(num_samples=9, sizes=(70, 60, 64, 3), seed=4)


@pytest.mark.parametrize("route", ["layerwise", "joint", "auto"])
def test_a_profile_is_the_exact_kappa_of_every_layer_within_its_standard_error(route):
    case = large_perceptron()
    profile = flatness_profile(
        case.loss_fn, case.params, batches_of(case), key=jax.random.key(0), num_probes=8, max_probes=8, route=route
    )
    exact = exact_profile(case)
    assert list(profile) == list(exact)
    for path, (value, error, num_probes) in profile.items():
        if num_probes:
            assert num_probes == 8 * 3
            assert 0 < abs(value - exact[path]) < 4 * error
        else:
            np.testing.assert_allclose(value, exact[path], rtol=1e-10)
    assert [num_probes > 0 for _, _, num_probes in profile.values()] == [True, True, False]  # the last is the head


@pytest.mark.parametrize("name", CASES)
def test_a_profile_with_probes_to_spare_is_exact_where_there_are_few_directions(name):
    case = CASES[name]()
    profile = flatness_profile(case.loss_fn, case.params, [case.batch], key=jax.random.key(0), num_probes=256)
    exact = dense_profile(case)
    for path, estimate in profile.items():
        np.testing.assert_allclose(estimate.value, exact[path], rtol=1e-6)
        assert (estimate.num_probes, estimate.standard_error) == (0, 0)


@pytest.mark.parametrize("route", ["layerwise", "joint"])
def test_probes_are_added_until_the_error_asked_for_is_reached(route):
    case = normalised()
    profile = flatness_profile(
        case.loss_fn, case.params, [case.batch, case.batch], key=jax.random.key(1), num_probes=4, relative_error=0.2,
        layers=["layer0/kernel"], max_probes=11, route=route,
    )  # fmt: skip
    assert profile["layer0/kernel"].num_probes <= 2 * 12
    case = wide_perceptron()
    profile = flatness_profile(
        case.loss_fn, case.params, [case.batch, case.batch], key=jax.random.key(1), num_probes=8, relative_error=0.5,
        layers=["layer0/kernel", "layer1/kernel"], max_probes=50, route=route,
    )  # fmt: skip
    for path, (value, error, num_probes) in profile.items():
        assert 2 * 8 <= num_probes <= 2 * 48  # whole blocks of 4
        assert abs(value - dense_kappa(case, path)) <= 4 * error


class DrawnAtRandom(Prober):
    """Draws of known mean and spread in place of probes, different in each batch."""

    def __init__(self, loss_fn, params, batch, program, layers, block, key):
        self.layers, self.block, self.num_drawn = layers, block, Counter()
        self.random = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def exact_routes(self, num_probes):
        return {}

    def _block(self, batch, group):
        self.num_drawn[batch] += self.block
        mean, spread = batch
        return {layer: self.random.normal(mean, spread, (self.block, 1)) for layer in group}


def read_by_mean(params, mean, spread):
    """A loss whose program shows the kernel; what is drawn of it does not come from it."""
    return jnp.sum(jnp.full((1, 3), mean) @ params["layer0"]["kernel"])


def drawn_profiles(monkeypatch, batches, num_repetitions, **options):
    """Value and standard error of each repetition, and draws of each batch in the last."""
    probers, params = [], perceptron().params
    monkeypatch.setattr(profile, "Prober", lambda *of: probers.append(DrawnAtRandom(*of)) or probers[-1])
    estimates = [
        flatness_profile(
            read_by_mean, params, batches, key=jax.random.key(seed), layers=["layer0/kernel"], count=lambda *of: 1,
            route="joint", **options,
        )["layer0/kernel"]
        for seed in range(num_repetitions)
    ]  # fmt: skip
    return np.asarray([(value, error) for value, error, _ in estimates], float), probers[-1].num_drawn


@pytest.mark.parametrize(("spread", "error"), [(2.0, 0.1), (5.0, 0.1), (5.0, 0.3)])
def test_a_profile_to_a_relative_error_has_about_that_error_and_hardly_a_bias(monkeypatch, spread, error):
    batches = [(1.0, spread)] * 12
    values, _ = drawn_profiles(monkeypatch, batches, 200, num_probes=16, relative_error=error, max_probes=4096)
    assert abs(np.mean(values[:, 0]) - 1) < error**2 + 4 * np.std(values[:, 0]) / 200**0.5
    assert 0.6 * error < np.median(values[:, 1] / values[:, 0]) < 1.2 * error
    assert 0.88 < np.mean(np.abs(values[:, 0] - 1) < 2 * values[:, 1]) < 0.99


def test_a_batch_that_is_wider_than_those_before_it_gets_more_probes(monkeypatch):
    batches = [(1.0, 1.0)] * 9 + [(1.0, 20.0)]
    _, num_drawn = drawn_profiles(monkeypatch, batches, 1, num_probes=16, relative_error=0.2, max_probes=100_000)
    assert num_drawn[1.0, 1.0] == 9 * 16
    assert num_drawn[1.0, 20.0] > 10 * 16


def test_batches_of_no_samples_are_left_out():
    case = perceptron()
    options = {"key": jax.random.key(0), "num_probes": 256, "layers": ["layer0/kernel"]}
    batches = batches_of(case)
    with_none, without = (
        flatness_profile(case.loss_fn, case.params, given, count=lambda x, y: len(x) % 2, **options)
        for given in (batches, batches[2:])
    )
    assert with_none == without
    with pytest.raises(ValueError, match="count is 0 for every batch"):
        flatness_profile(case.loss_fn, case.params, batches, count=lambda x, y: 0, **options)


def loss_with_a_norm(params, x, y):
    others = {name: leaf for name, leaf in params.items() if name != "a"}
    return perceptron_loss(others, x, y) + 1e-3 * jnp.sqrt(jnp.sum(params["a"]["kernel"] ** 2))


@pytest.mark.parametrize("route", ["layerwise", "joint"])
def test_a_layer_whose_curvature_is_nan_does_not_keep_the_others_from_being_measured(route):
    case = wide_perceptron()
    params = {"a": {"kernel": jnp.zeros((70, 60))}, **case.params}
    profile = flatness_profile(
        loss_with_a_norm, params, [case.batch, case.batch], key=jax.random.key(0), num_probes=4, relative_error=0.5,
        max_probes=16, layers=["a/kernel", "layer0/kernel"], route=route,
    )  # fmt: skip
    assert np.isnan(profile["a/kernel"].value)
    assert np.isfinite(profile["layer0/kernel"].value)


def test_what_is_chosen_is_one_of_the_routes_to_the_last_digit():
    case = large_perceptron()
    batches, options = batches_of(case), {"key": jax.random.key(2), "num_probes": 8, "relative_error": 0.4}
    profiles = {
        route: flatness_profile(case.loss_fn, case.params, batches, route=route, **options)
        for route in ("layerwise", "joint", "auto")
    }
    assert profiles["layerwise"] != profiles["joint"]
    assert profiles["auto"] in (profiles["layerwise"], profiles["joint"])
    alone = [
        flatness_profile(case.loss_fn, case.params, batches, route=route, layers=["layer0/kernel"], **options)
        for route in ("layerwise", "joint", "auto")
    ]
    assert alone[0] == alone[1] == alone[2]


def test_the_intervals_of_a_joint_probe_cover_each_layer():
    case = large_perceptron()
    kappas = np.asarray(list(dense_profile(case).values()))

    def estimate(key):
        layers = find_layers(case.params).values()
        curvatures = [LayerCurvature(case.loss_fn, case.params, case.batch, layer) for layer in layers]
        samples = jnp.concatenate(joint_probes(curvatures, jax.random.split(key, 64)), axis=1)
        return jnp.mean(samples, axis=0), jnp.std(samples, axis=0, ddof=1) / 8

    values, errors = jax.jit(lambda keys: jax.lax.map(estimate, keys))(jax.random.split(jax.random.key(0), 200))
    covered = np.mean(np.abs(values - kappas[None, :]) <= 2.0 * errors, axis=0)
    assert np.all((covered >= 0.9) & (covered <= 0.99))
    assert np.all(np.abs(np.mean(values, axis=0) - kappas) < 4 * np.std(values, axis=0) / 200**0.5)


def test_batches_are_weighted_by_what_they_count():
    case = perceptron()
    batches = batches_of(case)[1:]
    options = {"key": jax.random.key(0), "num_probes": 256, "layers": ["layer0/kernel"]}
    (estimate,) = flatness_profile(
        case.loss_fn, case.params, batches, count=lambda x, y: 1 if len(x) == 2 else 3, **options
    ).values()
    kappas = [dense_kappa(case._replace(batch=batch), "layer0/kernel") for batch in batches]
    np.testing.assert_allclose(estimate.value, np.average(kappas, weights=[1, 3]), rtol=1e-10)


@pytest.mark.parametrize("route", ["layerwise", "joint"])
def test_parameters_that_are_not_finite_give_nan(route):
    case = large_perceptron()
    case.params["layer0"]["kernel"] = case.params["layer0"]["kernel"].at[0, 0].set(jnp.nan)
    profile = flatness_profile(
        case.loss_fn, case.params, batches_of(case)[:1], key=jax.random.key(0), num_probes=8, relative_error=0.1,
        route=route,
    )  # fmt: skip
    assert all(np.isnan(estimate.value) for estimate in profile.values())


def test_progress_is_reported_after_each_batch():
    case, seen = large_perceptron(), []
    flatness_profile(
        case.loss_fn, case.params, batches_of(case), key=jax.random.key(0), num_probes=8, route="joint",
        report=seen.append,
    )  # fmt: skip
    assert len(seen) == 3
    assert list(seen[0]) == list(seen[1]) == list(seen[2]) == ["layer0/kernel", "layer1/kernel", "layer2/kernel"]


def test_batches_are_gone_through_once_and_the_same_key_gives_the_same_profile():
    case = large_perceptron()
    options = {"key": jax.random.key(3), "num_probes": 8, "route": "joint", "max_probes": 8}
    batches = batches_of(case)
    profiles = [flatness_profile(case.loss_fn, case.params, each, **options) for each in (batches, iter(batches))]
    assert profiles[0] == profiles[1]


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "batches is empty", {"batches": []}),
        (TypeError, "tuple", {"batches": [np.ones(3)]}),
        (ValueError, r"wanted several, as \['layer0/kernel'\]", {"layers": "layer0/kernel"}),
        (ValueError, "route is 'both', wanted", {"route": "both"}),
        (ValueError, "num_probes is 5", {"num_probes": 5}),
        (ValueError, "num_probes is 16 and max_probes 8", {"max_probes": 8}),
        (ValueError, "no leaf at 'head'", {"layers": ["head"]}),
        (ValueError, "layers is empty", {"layers": []}),
        (ValueError, "names a leaf twice", {"layers": ["layer0/kernel", Layer("layer0/kernel", (1,))]}),
    ],
)
def test_bad_input_is_named(error, message, options):
    case = perceptron()
    given = {"batches": [case.batch], "key": jax.random.key(0)} | options
    with pytest.raises(error, match=message):
        flatness_profile(case.loss_fn, case.params, given.pop("batches"), **given)
