"""What is read off a head in tiles of rows is what the dense head gives, whatever the tiles and the order in them."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatjax
from flatjax.flatness.tiled.readout import Readout, read_out
from flatjax.heads import linear_head


def tiled_readout(weight, bias, feats, labels, *, tile_size=None, layout="embedding"):
    matrix = weight.T if layout == "kernel" else weight
    return read_out(linear_head({layout: matrix, "bias": bias}), feats, labels, tile_size=tile_size)


def dense_readout(weight, bias, feats, labels):
    """With G the Hessian of the loss in the logits by autodiff."""

    def of_sample(phi, label):
        logits = weight @ phi + bias
        G = jax.hessian(helpers.softmax_cross_entropy)(logits, label)
        flatness = phi @ phi * jnp.sum(weight * (G @ weight))
        return Readout(helpers.softmax_cross_entropy(logits, label), jnp.trace(G), flatness)

    return jax.vmap(of_sample)(feats, labels)


def with_gradient(readout):
    """Also that of Σ_i ⟨mixture, (ℓ_i, tr G_i, v_i)⟩ in the weight, bias and features."""

    def mixed(mixture, weight, bias, feats, labels, **options):
        values = jnp.stack(readout(weight, bias, feats, labels, **options))
        return jnp.sum(mixture @ values), values

    differentiated = jax.value_and_grad(mixed, argnums=(1, 2, 3), has_aux=True)
    differentiated = jax.jit(differentiated, static_argnames=("tile_size", "layout"))

    def values_and_gradient(*args, **options):
        (_, values), gradient = differentiated(*args, **options)
        return values, *gradient

    return values_and_gradient


tiled, dense = with_gradient(tiled_readout), with_gradient(dense_readout)
tiled_readout = jax.jit(tiled_readout, static_argnames=("tile_size", "layout"))
dense_readout = jax.jit(dense_readout)
MIXTURES = [*np.eye(3), np.array([1, -0.7, 0.3])]


def assert_close(got, want, rtol):
    """To `rtol` of the largest entry of an array, if that is above 1."""
    for x, y in zip(got, want, strict=True):
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(1, np.max(np.abs(y))))


def assert_dense(weight, bias, feats, labels, *, rtol=1e-13, mixtures=MIXTURES, **options):
    exact = weight.astype(float), bias.astype(float), feats.astype(float), labels
    for mixture in mixtures:
        got = tiled(mixture.astype(feats.dtype), weight, bias, feats, labels, **options)
        assert_close(got, dense(mixture, *exact), rtol)


@pytest.mark.parametrize(("d", "tile_size"), [(1, 1), (2, 1), (3, 4), (4, 4), (5, 4), (7, 2), (7, 6), (7, 1), (13, 5)])
def test_tiles_of_any_size_read_what_the_dense_head_gives(d, tile_size):
    problem = helpers.random_problem(d, 3, (1 if d == 13 else 5,))
    layout = "kernel" if tile_size % 2 else "embedding"
    got = tiled_readout(*problem[:4], tile_size=tile_size, layout=layout)
    assert got.losses.dtype == got.traces.dtype == got.flatness.dtype == jnp.float64
    assert_close(got, dense_readout(*problem[:4]), 1e-13)


# The last tile of 8 rows in tiles of 3 is of the rows 5, 6 and 7, the first of which was read before.
D, TILE = 8, 3
ORDERS = {
    "increasing": np.arange(8) / 2,
    "decreasing": -np.arange(8) / 2,
    "steep": 30 * np.arange(8),
    "all equal": np.zeros(8),
    "two largest in a tile": [0, 2, 2, 0, 1, 0, 0, 0],
    "two largest in the last tile": [0, 1, 1, 0, 1, 0, 2, 2],
    "a largest in every tile": [2, 0, 0, 2, 0, 0, 0, 2],
    "two largest, the latter in the overlap": [0, 0, 2, 1, 0, 2, 0, 0],
    "largest in the overlap": [0, 1, 0, 1, 0, 3, 1, 0],
    "largest after the overlap": [0, 1, 0, 1, 0, 0, 3, 0],
    "largest in the end": [0, 1, 0, 1, 0, 0, 0, 3],
    "far below": [0, 0, -150, 0, 0, -800, -200, 0],
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_order_of_the_logits_does_not_matter(order):
    problem = helpers.random_problem(D, 3, (D,))
    # Features across to all rows, so that the logits are the biases, exactly; every row is a label.
    problem.weight[:, 0], problem.feats[:, 1:] = 0, 0
    assert_dense(problem.weight, np.array(ORDERS[order], float), problem.feats, np.arange(D), tile_size=TILE)


@pytest.mark.parametrize("rows", [range(D), [0] * D, [0, 1, 1, 3, 1, 5, 5, 1]], ids=str)
def test_equal_rows_are_rows_like_others(rows):
    weight, bias, feats, *_ = helpers.random_problem(D, 3, (D,))
    rows = np.array(rows)
    assert_dense(weight[rows], bias[rows], feats, np.arange(D), tile_size=TILE, layout="kernel")


@pytest.mark.parametrize(
    "kept", [[3, 4, 5, 6, 7], [0, 1, 2, 6, 7], [0, 1, 2, 3, 4], [0], [5], [7]], ids=lambda kept: f"all but {kept}"
)
def test_a_class_masked_by_a_bias_of_minus_infinity_is_no_class(kept):
    weight, bias, feats, *_ = helpers.random_problem(D, 3, (D,))
    place = np.arange(D) % len(kept)
    masked = (weight, np.where(np.isin(np.arange(D), kept), bias, -np.inf), feats, np.array(kept)[place])
    for mixture in MIXTURES:
        values, by_weight, by_bias, by_feats = dense(mixture, weight[kept], bias[kept], feats, place)
        want = (values, np.zeros_like(weight), np.zeros_like(bias), by_feats)
        want[1][kept], want[2][kept] = by_weight, by_bias
        assert_close(tiled(mixture, *masked, tile_size=TILE), want, 1e-13)


@pytest.mark.parametrize("mixture", MIXTURES, ids=["loss", "trace", "flatness", "all"])
def test_what_all_rows_share_costs_float32_no_digits(mixture):
    problem = helpers.random_problem(D, 3, (D,))
    shift = 1e3 * np.random.default_rng(1).normal(size=(1, 3))
    # What the sum rounds off the rows is lost to the truth too.
    problem = problem._replace(weight=problem.weight + shift).astype(np.float32)
    assert_dense(*problem[:4], rtol=2e-6, mixtures=[mixture], tile_size=TILE)


def test_logits_of_ten_thousand_do_not_overflow():
    problem = helpers.random_problem(D, 3, (D,))
    problem = problem._replace(bias=1e4 * np.array([1, -1, 1, 1, -1, 0.99, -1, 1])).astype(np.float32)
    assert_dense(*problem[:4], rtol=1e-3, tile_size=TILE)  # Float32 knows a logit of 1e4 to 1e-3.


@pytest.mark.parametrize(("scale", "rtol"), [(8, 5e-6), (30, 1e-5), (60, 2e-5)])
def test_float32_keeps_the_gradient_of_the_traces_of_a_collapsed_head(scale, rtol):
    problem = helpers.collapsed_problem(13, 16, 40, scale)
    weight, bias, feats, labels, _ = problem.astype(np.float64)
    p = np.asarray(jax.nn.softmax(feats @ weight.T + bias))
    # The gradient in the logits, −2 p_s (p_s − ‖p‖²), and its product with the rows, from differences of rows.
    u = -2 * np.einsum("is,it,ist->is", p, p, p[:, :, None] - p[:, None, :])
    want = u.T @ feats, np.sum(u, axis=0), np.einsum("is,isk->ik", u, weight[None] - weight[labels][:, None])
    got = tiled(np.float32([0, 1, 0]), *problem[:4], tile_size=5)[1:]
    for x, y in zip(got, want, strict=True):
        errors = np.linalg.norm(np.atleast_2d(np.asarray(x, float) - y), axis=1)
        assert np.all(errors < rtol * np.linalg.norm(np.atleast_2d(y), axis=1))


# κ and κ̂ in tiles.


@functools.partial(jax.jit, static_argnames="tile_size")
def two_kappas(params, feats, labels, weights=None, *, tile_size):
    args, options = (params, feats, labels), {"weights": weights, "tile_size": tile_size}
    both = flatjax.relative_flatness(*args, **options), flatjax.simplified_relative_flatness(*args, **options)
    return jnp.stack(both)


def measure(problem, tile_size):
    return two_kappas(problem.params, problem.feats, problem.labels, problem.weights, tile_size=tile_size)


@pytest.mark.parametrize(
    ("d", "m", "leading", "tile_size", "layout", "bias", "weights", "labels"),
    [
        (7, 2, (5,), 3, "kernel", True, True, "classes"),
        (5, 3, (2, 3), 4, "embedding", False, True, "mass"),
        (6, 1, (), 1, "kernel", False, False, "distribution"),
    ],
)
def test_kappa_in_tiles_is_that_of_the_dense_hessian(d, m, leading, tile_size, layout, bias, weights, labels):
    problem = helpers.random_problem(d, m, leading, labels)
    params = {layout: problem.weight.T if layout == "kernel" else problem.weight}
    params |= {"bias": problem.bias} if bias else {}
    omega = problem.weights if weights else None
    got = two_kappas(params, problem.feats, problem.labels, omega, tile_size=tile_size)
    want = helpers.dense_flatness(helpers.softmax_cross_entropy, problem, bias=bias, weights=weights)
    np.testing.assert_allclose(got, [want.kappa, want.simplified], rtol=1e-12)


def test_a_data_sets_kappa_in_tiles_is_the_weighted_mean_of_its_batches():
    problem = helpers.random_problem(D, 3, (3, 5))
    parts = [two_kappas(problem.params, *batch, tile_size=TILE) for batch in zip(*problem[2:], strict=True)]
    want = np.average(parts, axis=0, weights=problem.weights.sum(axis=1))
    np.testing.assert_allclose(measure(problem, TILE), want, rtol=1e-13)


# At κ = 1e-30 the products in ⟨Σ e_s w_s, w_j⟩ are about to leave float32, whose smallest normal number is 1e-38.
@pytest.mark.parametrize(("scale", "rtol"), [(8, 2e-6), (20, 2e-6), (30, 2e-6), (60, 1e-5), (83, 1e-3)])
def test_float32_keeps_kappa_of_a_collapsed_head_in_tiles(scale, rtol):
    problem = helpers.collapsed_problem(31, 40, 62, scale)
    want = helpers.softmax_flatness_without_cancellation(problem)
    assert want.kappa > 0.5 if scale == 8 else want.kappa < {20: 1e-4, 30: 1e-8, 60: 1e-20, 83: 1e-30}[scale]
    got = measure(problem, 7)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [want.kappa, want.simplified], rtol=rtol, atol=0)


def test_bfloat16_is_computed_on_in_float32():
    problem = helpers.random_problem(23, 4, (9,)).astype(jnp.bfloat16)
    got, want = measure(problem, 5), helpers.dense_flatness(helpers.softmax_cross_entropy, problem)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [want.kappa, want.simplified], rtol=2e-6)


def test_a_sample_without_weight_or_with_an_ignored_label_counts_for_nothing_in_tiles():
    _, _, feats, labels, weights = problem = helpers.random_problem(D, 3, (5,))
    kept = [0, 2, 4]
    weights[kept] = [1, 2, 0.5]
    want = measure(problem._replace(feats=feats[kept], labels=labels[kept], weights=weights[kept]), None)
    feats[[1, 3]], labels[[1, 3]], weights[[1, 3]] = np.nan, [-100, 10**6], [1, 0]
    np.testing.assert_allclose(measure(problem, TILE), want, rtol=1e-13)


NOT_A_NUMBER = [(name, 4, np.nan) for name in ("weight", "bias", "feats", "weights")]
INFINITE = [("weight", 4, np.inf), ("feats", 4, np.inf), ("feats", 4, 1e200), ("weights", 4, np.inf)]
OUT_OF_RANGE = [("labels", 4, D), ("labels", 4, -1), ("weights", 4, -1)]
NOTHING_LEFT = [("labels", slice(5), -100), ("weights", slice(5), 0), ("bias", slice(D), -np.inf)]


@pytest.mark.parametrize(("name", "place", "value"), [*NOT_A_NUMBER, *INFINITE, *OUT_OF_RANGE, *NOTHING_LEFT])
def test_bad_values_and_no_sample_or_class_at_all_make_kappa_in_tiles_nan(name, place, value):
    problem = helpers.random_problem(D, 3, (5,))
    getattr(problem, name).flat[place] = value
    assert np.all(np.isnan(measure(problem, TILE)))


@pytest.mark.parametrize("metric", [flatjax.relative_flatness, flatjax.simplified_relative_flatness])
@pytest.mark.parametrize(
    ("tile_size", "loss", "error", "match"),
    [
        (0, "softmax_cross_entropy", ValueError, "tile_size is 0, wanted at least 1"),
        (2.5, "softmax_cross_entropy", TypeError, "tile_size is a float, wanted a number of rows"),
        (3, "squared_error", ValueError, "tile_size is 3, but only softmax_cross_entropy"),
        (3, helpers.focal, ValueError, "tile_size is 3, but only softmax_cross_entropy"),
    ],
)
def test_what_cannot_be_read_in_tiles_is_refused_while_tracing(metric, tile_size, loss, error, match):
    problem = helpers.random_problem(D, 3, (5,))
    metric = functools.partial(metric, tile_size=tile_size, loss=loss)
    with helpers.raises(error, match):
        jax.eval_shape(metric, problem.params, problem.feats, problem.labels)
