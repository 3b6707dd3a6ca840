"""The worst change of the logits against all corners of the box, and its rise against sums in NumPy."""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax import logit_sharpness
from flatjax.flatness.logit_sharpness import head_logit_sharpness

D, M, N = 7, 3, 6
RADIUS = 0.01
measure = jax.jit(logit_sharpness, static_argnames="radius")
of_head = jax.jit(head_logit_sharpness, static_argnames=("radius", "tile_size"))


def random_logits(leading=(N,), d=D, seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.1, 2, leading)
    return scale * rng.normal(size=(*leading, d)), rng.integers(0, d, leading), weights


def cross_entropies(logits, labels):
    """log(1 + Σ_{s≠y} exp(z_s − z_y)), in more digits than float64."""
    logits = np.asarray(logits, np.longdouble)
    margins = logits - np.take_along_axis(logits, labels[..., None], axis=-1)
    others = np.where(np.arange(logits.shape[-1]) == labels[..., None], 0, np.exp(margins))
    return np.log1p(others.sum(axis=-1))


def expected(logits, labels, weights, radius):
    """The means by definition: rise, loss, and their ratio."""
    logits = np.asarray(logits, np.longdouble)
    sign = np.where(np.arange(logits.shape[-1]) == labels[..., None], -1, 1)
    loss = cross_entropies(logits, labels)
    rise = cross_entropies(logits + sign * np.longdouble(radius) * (np.abs(logits) + 1), labels) - loss
    rise, loss = (float(np.average(x, weights=weights)) for x in (rise, loss))
    return rise, loss, 100 * rise / (1 + loss)


def test_no_corner_of_the_box_nor_any_point_in_it_is_worse():
    radius = 0.3
    (logits,), (label,), _ = random_logits((1,), d=4)
    got = logit_sharpness(logits, label, radius=radius)
    box = radius * (np.abs(logits) + 1)
    corners = np.array([logits + box * signs for signs in itertools.product((-1, 1), repeat=4)])
    inside = logits + box * np.random.default_rng(1).uniform(-1, 1, (1000, 4))
    worst = np.max(cross_entropies(corners, np.full(16, label)))
    np.testing.assert_allclose(got.rise + got.loss, float(worst), rtol=1e-13)
    assert np.all(cross_entropies(inside, np.full(1000, label)) < worst)


@pytest.mark.parametrize(
    ("leading", "radius"), [((), RADIUS), ((2, 3), RADIUS), ((N,), 0.0), ((N,), RADIUS), ((N,), 0.4), ((N,), 5.0)]
)
def test_the_rise_is_that_of_its_definition(leading, radius):
    logits, labels, weights = random_logits(leading)
    got = measure(logits, labels, weights, radius=radius)
    np.testing.assert_allclose(got, expected(logits, labels, weights, radius), rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("label", [4, -100, D])
def test_where_a_weight_is_zero_its_derivative_is_that_of_the_mean_if_the_sample_is_one(label):
    logits, labels, weights = random_logits()
    labels[2], weights[2] = label, 0
    kept = np.arange(N) != 2
    got = jax.jacrev(measure, argnums=2)(logits, labels, weights)
    without = jax.jacrev(measure, argnums=2)(logits[kept], labels[kept], weights[kept])
    of_all = measure(logits, labels, weights)
    for name in ("rise", "loss"):
        slopes = getattr(got, name)
        np.testing.assert_allclose(slopes[kept], getattr(without, name), rtol=1e-10)
        own = getattr(measure(logits[2:3], labels[2:3], np.ones(1)), name) if label == 4 else getattr(of_all, name)
        np.testing.assert_allclose(slopes[2], (own - getattr(of_all, name)) / weights.sum(), rtol=1e-9)


def test_without_weights_all_samples_count_the_same():
    logits, labels, _ = random_logits()
    np.testing.assert_allclose(measure(logits, labels), expected(logits, labels, np.ones(N), 1e-3), rtol=1e-13)


@pytest.mark.parametrize("layout", ["kernel", "embedding"])
@pytest.mark.parametrize(("tile_size", "radius"), [(None, 5.0), (1, RADIUS), (2, 5.0), (D - 1, RADIUS), (D, 5.0)])
def test_in_tiles_the_rise_is_that_of_all_logits(layout, tile_size, radius):
    problem = helpers.random_problem(D, M, (2, 3))
    logits = problem.feats @ problem.weight.T + problem.bias
    want = expected(logits, problem.labels, problem.weights, radius)
    params = {layout: problem.weight if layout == "embedding" else problem.weight.T, "bias": problem.bias}
    got = of_head(params, problem.feats, problem.labels, problem.weights, radius=radius, tile_size=tile_size)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("confidence", [1, 10, 60])
@pytest.mark.parametrize("radius", [1e-6, 1e-2])
def test_float32_keeps_the_digits_of_a_small_rise(confidence, radius):
    logits, labels, weights = random_logits()
    logits[np.arange(N), labels] += confidence
    logits = logits.astype(np.float32)
    want = expected(logits, labels, weights, radius)
    assert want[0] < {1: 1, 10: 1e-3, 60: 1e-23}[confidence]
    got = measure(logits, labels, weights.astype(np.float32), radius=radius)
    assert got.rise.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=2e-5)  # A logit of 60 is itself known to 4e-6.


def test_float32_keeps_the_loss_where_all_logits_share_an_offset():
    logits, labels, weights = random_logits()
    logits = (logits + 3e4).astype(np.float32)
    want = expected(logits, labels, weights, 1e-3)
    np.testing.assert_allclose(measure(logits, labels, weights.astype(np.float32), radius=1e-3), want, rtol=1e-6)


def test_logits_of_ten_thousand_do_not_overflow():
    logits, labels, weights = random_logits(scale=5e3)
    got = measure(logits.astype(np.float32), labels, weights.astype(np.float32))
    np.testing.assert_allclose(got, expected(logits.astype(np.float32), labels, weights, 1e-3), rtol=1e-4)


def test_a_shift_of_all_logits_changes_the_rise_but_not_the_loss():
    logits, labels, weights = random_logits()
    at_zero, shifted = (measure(logits + shift, labels, weights) for shift in (0, 50))
    np.testing.assert_allclose(shifted.loss, at_zero.loss, rtol=1e-12)
    assert shifted.rise > 5 * at_zero.rise


def test_permuted_classes_and_samples_change_nothing():
    logits, labels, weights = random_logits()
    classes, samples = np.random.default_rng(1).permutation(D), np.random.default_rng(2).permutation(N)
    permuted = logits[:, classes][samples], np.argsort(classes)[labels][samples], weights[samples]
    np.testing.assert_allclose(measure(*permuted), measure(logits, labels, weights), rtol=1e-13)


def test_an_output_of_minus_infinity_is_none():
    problem = helpers.random_problem(D, M, (N,))
    masked = np.arange(D) == 4
    problem.labels[problem.labels == 4] = 3
    logits = problem.feats @ problem.weight.T + problem.bias
    want = measure(logits[:, ~masked], problem.labels - (problem.labels > 4), problem.weights)
    np.testing.assert_allclose(measure(np.where(masked, -np.inf, logits), problem.labels, problem.weights), want)
    params = {"kernel": problem.weight.T, "bias": np.where(masked, -np.inf, problem.bias)}
    for tile_size in (1, 3):
        got = of_head(params, problem.feats, problem.labels, problem.weights, tile_size=tile_size)
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_padding_counts_for_nothing():
    problem = helpers.random_problem(D, M, (N,))
    _, _, feats, labels, weights = problem
    weights[:] = np.arange(1, N + 1)
    kept = [0, 2, 3]
    want = of_head(problem.params, feats[kept], labels[kept], weights[kept])
    feats[[1, 4, 5]], labels[[1, 4, 5]], weights[[1, 4]] = np.nan, [2, 10**6, -100], 0
    np.testing.assert_allclose(of_head(problem.params, feats, labels, weights, tile_size=3), want, rtol=1e-13)
    logits = feats @ problem.weight.T + problem.bias
    np.testing.assert_allclose(measure(logits, labels, weights), want, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "value"), [("feats", np.nan), ("feats", np.inf), ("labels", D), ("labels", -1), ("weights", -1)]
)
def test_bad_values_give_no_number(name, value):
    problem = helpers.random_problem(D, M, (N,))
    getattr(problem, name).flat[4] = value
    _, _, feats, labels, weights = problem
    assert np.all(np.isnan(of_head(problem.params, feats, labels, weights, tile_size=3)))
    logits = np.zeros((N, D))
    logits[1, 1] = value if name == "feats" else 0
    assert np.all(np.isnan(measure(logits, labels, weights)))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_head_gives_no_number(name, value):
    problem = helpers.random_problem(D, M, (N,))
    getattr(problem, name).flat[4] = value
    assert np.all(np.isnan(of_head(problem.params, problem.feats, problem.labels, tile_size=3)))


def test_a_label_of_an_output_that_is_none_and_no_sample_at_all_give_no_number():
    logits, labels, weights = random_logits()
    logits[2, labels[2]] = -np.inf
    assert np.isnan(measure(logits, labels, weights).rise)
    assert np.all(np.isnan(measure(logits, np.full(N, -100), weights)))


@pytest.mark.parametrize(("radius", "tile_sizes"), [(RADIUS, (2, D)), (5.0, (2,))])
def test_gradients_are_those_of_finite_differences_and_the_same_in_tiles(radius, tile_sizes):
    problem = helpers.random_problem(D, M, (N,))

    def rise(params, feats, tile_size):
        return of_head(params, feats, problem.labels, problem.weights, radius=radius, tile_size=tile_size).rise

    point = problem.params, problem.feats
    gradients = [jax.grad(functools.partial(rise, tile_size=size), argnums=(0, 1))(*point) for size in tile_sizes]
    for x, y in zip(*(jax.tree.leaves(gradients[i]) for i in (0, -1)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), point)
    ahead, behind = (rise(*jax.tree.map(lambda x, v, s=s: x + s * v, point, direction), 2) for s in (1e-6, -1e-6))
    along = sum(np.sum(x * v) for x, v in zip(*map(jax.tree.leaves, (gradients[0], direction)), strict=True))
    np.testing.assert_allclose(along, (ahead - behind) / 2e-6, rtol=1e-7)


@pytest.mark.parametrize("logits", [np.zeros((2, D)), np.eye(2, D) * 200], ids=["zero", "certain"])
def test_gradients_are_finite_where_logits_are_equal_or_certain(logits):
    labels = np.array([0, 1])
    assert np.all(np.isfinite(jax.grad(lambda z: measure(z, labels).rise)(logits)))


def test_bfloat16_is_computed_on_in_float32():
    problem = helpers.random_problem(D, M, (N,)).astype(jnp.bfloat16)
    wide = problem.astype(np.float64)
    logits = wide.feats @ wide.weight.T + wide.bias
    want = expected(logits, wide.labels, wide.weights, RADIUS)
    got = of_head(problem.params, problem.feats, problem.labels, problem.weights, radius=RADIUS, tile_size=3)
    assert got.rise.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=5e-6)
    narrow = logits.astype(jnp.bfloat16)
    want = expected(narrow.astype(np.float64), wide.labels, wide.weights, RADIUS)
    np.testing.assert_allclose(measure(narrow, wide.labels, problem.weights, radius=RADIUS), want, rtol=5e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_vocabulary_and_samples_on_eight_devices_give_what_one_gives(axis_type):
    problem = helpers.random_problem(16, M, (8,))
    want = of_head(problem.params, problem.feats, problem.labels, problem.weights)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)

    def place(x, *names):
        return jax.device_put(x, NamedSharding(mesh, P(*names)))

    with jax.set_mesh(mesh):
        params = {"kernel": place(problem.weight.T, None, "model"), "bias": place(problem.bias, "model")}
        samples = [place(x, "data") for x in (problem.feats, problem.labels, problem.weights)]
        got = of_head(params, *samples, tile_size=8)
        logits = place(problem.feats @ problem.weight.T + problem.bias, "data", "model")
        of_logits = measure(logits, *samples[1:])
    np.testing.assert_allclose(got, want, rtol=1e-12)
    np.testing.assert_allclose(of_logits, want, rtol=1e-12)


def test_vmap_is_a_loop():
    logits, labels, weights = random_logits((3, N))
    want = [measure(*sample) for sample in zip(logits, labels, weights, strict=True)]
    np.testing.assert_allclose(np.transpose(jax.vmap(measure)(logits, labels, weights)), want, rtol=1e-13)


LOGITS, LABELS = random_logits()[:2]


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda: logit_sharpness(LOGITS.astype(int), LABELS), TypeError, "logits has dtype int64"),
        (lambda: logit_sharpness(LOGITS[:, :1], LABELS), ValueError, r"logits has shape \(6, 1\)"),
        (lambda: logit_sharpness(LOGITS, LABELS[:4]), ValueError, r"labels has shape \(4,\)"),
        (lambda: logit_sharpness(LOGITS, LABELS * 1.0), TypeError, "labels has dtype float64"),
        (lambda: logit_sharpness(LOGITS, LABELS, np.ones(4)), ValueError, r"weights has shape \(4,\)"),
        (lambda: logit_sharpness(LOGITS, LABELS, radius=-1), ValueError, "radius is -1"),
        (
            lambda: head_logit_sharpness({"kernel": np.ones((D, 4))}, LOGITS, LABELS, tile_size=0),
            ValueError,
            "tile_size is 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(run, error, match):
    with helpers.raises(error, match):
        run()
