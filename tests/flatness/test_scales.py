"""Features and weights of any scale, a row far from all others, a number that all biases share: none costs digits."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flatjax
from flatjax.flatness.frame import mean_by_importance
from flatjax.flatness.logit_sharpness import head_logit_sharpness

# Over the pairs of few rows, around the largest logit of many, and in tiles.
ROUTES = {"pairs": (5, 12, 20, None), "largest": (9, 7, 24, None), "tiles": (9, 7, 24, 4)}


def scaled(problem, c):
    return problem._replace(weight=problem.weight / c, feats=problem.feats * c)


def with_far_row(problem, row, *, behind):
    """The first row, `behind` the others for every sample, or for half of them."""
    weight, feats = problem.weight.copy(), problem.feats.copy()
    if behind:
        feats[:, 0] = 0.1 + np.abs(feats[:, 0])
        weight[0, 0] = row
    else:
        weight[0] = row * np.random.default_rng(1).normal(size=weight.shape[1])
    return problem._replace(weight=weight, feats=feats)


def with_far_row_for_most(problem, row):
    """The first row, which all samples predict but two."""
    weight, feats = problem.weight.copy(), problem.feats.copy()
    weight[0, 0], feats[:, 0] = row, 0.1 + np.abs(feats[:, 0])
    feats[[6, 9], 0] *= -1
    return problem._replace(weight=weight, feats=feats)


def without_outputs(problem, outputs):
    bias = problem.bias.copy()
    bias[outputs] = -np.inf
    return problem._replace(bias=bias)


CHANGES = {
    "as it is": lambda p: p,
    **{f"features times 2^{k}": functools.partial(scaled, c=2.0**k) for k in (-70, -63, -40, 40, 63, 70)},
    "small logits": lambda p: p._replace(weight=p.weight * 1e15, feats=p.feats * 1e-22),
    **{f"a row at {row:g}": functools.partial(with_far_row, row=row, behind=True) for row in (-1e4, -3e7, -1e9)},
    **{f"a row {row:g} away": functools.partial(with_far_row, row=row, behind=False) for row in (1e4, 3e7, 1e9)},
    **{f"a row at {row:g} that most predict": functools.partial(with_far_row_for_most, row=row) for row in (1e6, 1e9)},
    "a far row of small weights": lambda p: scaled(with_far_row(p, -3e7, behind=True), 2.0**60),
    **{f"biases of {b:g}": lambda p, b=b: p._replace(bias=p.bias + b) for b in (-(2.0**21), 2.0**21, 1e8)},
    "biases of 2^21, and of -inf": lambda p: without_outputs(p._replace(bias=p.bias + 2.0**21), [1, 3]),
    "a bias of -1e9": lambda p: p._replace(bias=np.where(np.arange(len(p.bias)) == 2, -1e9, p.bias)),
    "rows of 1e4": lambda p: p._replace(weight=p.weight + 1e4),
}


def changed(route, change):
    """In float32, so that truth and measurement have the same input; no label is of an output that is left out."""
    d, m, n, tile_size = ROUTES[route]
    problem = helpers.random_problem(d, m, (n,))._replace(weights=np.ones(n))
    problem = CHANGES[change](problem._replace(labels=np.where(problem.labels % 2 == 0, problem.labels, 4)))
    return problem.astype(np.float32), tile_size


@functools.partial(jax.jit, static_argnames="tile_size")
def measured(params, feats, labels, *, tile_size):
    options = {"tile_size": tile_size}

    def kappa(params, feats):
        return flatjax.relative_flatness(params, feats, labels, **options)

    def loss(params, feats):
        return flatjax.cross_entropy_and_flatness(params, feats, labels, **options)

    (loss_value, second_kappa), by_loss = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, feats)
    value, by_kappa = jax.value_and_grad(kappa, argnums=(0, 1))(params, feats)
    values = {
        "kappa": value,
        "kappa with the loss": second_kappa,
        "simplified": flatjax.simplified_relative_flatness(params, feats, labels, **options),
        "maximal": flatjax.max_relative_flatness(params, feats, labels),
        "loss": loss_value,
        "loss of its sharpness": head_logit_sharpness(params, feats, labels, **options).loss,
    }
    return values, by_loss, by_kappa


def loss_and_gradient(problem):
    weight, bias, feats, labels, _ = problem.astype(np.float64)
    logits = feats @ weight.T + bias
    relative = logits - logits[np.arange(len(feats)), labels][:, None]
    largest = relative.max(axis=1)
    p = np.exp(relative - largest[:, None])
    loss = np.mean(largest + np.log(p.sum(axis=1)))
    residuals = (p / p.sum(axis=1, keepdims=True) - np.eye(len(weight))[labels]) / len(feats)
    return loss, (residuals.T @ feats, residuals.sum(axis=0), residuals @ weight)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("change", CHANGES)
def test_every_number_of_a_softmax_head_and_its_gradients_are_right_in_float32(route, change):
    problem, tile_size = changed(route, change)
    params = {"embedding": problem.weight, "bias": problem.bias}
    values, by_loss, by_kappa = measured(params, problem.feats, problem.labels, tile_size=tile_size)
    with np.errstate(over="ignore"):
        want, (loss, gradient) = helpers.softmax_flatness_without_cancellation(problem), loss_and_gradient(problem)
    wants = {
        "kappa": want.kappa,
        "kappa with the loss": want.kappa,
        "simplified": want.simplified,
        "maximal": want.maximal,
        "loss": loss,
        "loss of its sharpness": loss,
    }
    assert np.isfinite(loss)
    for name, value in values.items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wants[name], rtol=1e-5, atol=0, err_msg=name)
    for (head, by_feats), right in (
        (by_loss, gradient),
        (by_kappa, helpers.kappa_gradient_without_cancellation(problem)),
    ):
        for x, y in zip((head["embedding"], head["bias"], by_feats), right, strict=True):
            assert np.linalg.norm(np.asarray(x, float) - y) <= 1e-5 * np.linalg.norm(y)


@functools.partial(jax.jit, static_argnames="loss")
def three_with_jacobians(params, feats, labels, weights, *, loss):
    def three(params, feats):
        metrics = flatjax.relative_flatness, flatjax.simplified_relative_flatness, flatjax.max_relative_flatness
        values = jnp.stack([metric(params, feats, labels, weights=weights, loss=loss) for metric in metrics])
        return values, values

    jacobians, values = jax.jacrev(three, argnums=(0, 1), has_aux=True)(params, feats)
    return values, *jacobians


# The shape chooses how κ of a softmax head is computed, and of a callable; not of a sum over the outputs.
EITHER_SHAPE = [(d, m, loss) for d, m in [(3, 5), (6, 4)] for loss in ("softmax_cross_entropy", helpers.focal)]
SEPARABLE = [(3, 5, "squared_error"), (3, 5, "sigmoid_cross_entropy")]


@pytest.mark.parametrize(("d", "m", "loss"), EITHER_SHAPE + SEPARABLE, ids=helpers.name_of)
@pytest.mark.parametrize("power", [-70, -64, 64, 70])
def test_kappa_and_its_variants_under_any_loss_do_not_change_when_features_grow_as_weights_shrink(d, m, power, loss):
    problem = helpers.random_problem(d, m, (9,)).astype(np.float32)

    def values_and_jacobians(c):
        params = {"embedding": problem.weight / c, "bias": problem.bias}
        values, by_params, by_feats = three_with_jacobians(
            params, problem.feats * c, problem.labels, problem.weights, loss=loss
        )
        return values, by_params["embedding"] / c, by_feats * c

    got, want = values_and_jacobians(np.float32(2.0**power)), values_and_jacobians(np.float32(1))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    for x, y in zip(got[1:], want[1:], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * abs(want[0][0]))
    dense = helpers.dense_flatness(helpers.NAMED.get(loss, loss), problem)
    np.testing.assert_allclose(want[0], [dense.kappa, dense.simplified, dense.maximal], rtol=1e-5)


@pytest.mark.parametrize("power", [-55, 55])
def test_the_row_block_traces_have_the_square_of_the_scale_of_the_features(power):
    problem = helpers.random_problem(5, 4, (9,)).astype(np.float32)
    want = flatjax.row_block_traces(problem.params, problem.feats, problem.labels)
    there = scaled(problem, np.float32(2.0**power))
    got = flatjax.row_block_traces(there.params, there.feats, there.labels)
    np.testing.assert_allclose(got / np.float32(2.0 ** (2 * power)), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_constant_in_all_biases_of_half_precision_leaves_kappa_as_it_is(dtype):
    problem = helpers.random_problem(9, 7, (24,))
    weight, feats = (x.astype(jnp.dtype(dtype)) for x in (problem.weight, problem.feats))

    def kappa(shared, tile_size):
        params = {"embedding": weight, "bias": np.full(9, shared, jnp.dtype(dtype))}
        return flatjax.relative_flatness(params, feats, problem.labels, tile_size=tile_size)

    for tile_size in (None, 4):
        np.testing.assert_allclose(kappa(3e4, tile_size), kappa(0, tile_size), rtol=1e-6)


@pytest.mark.parametrize(
    ("importance", "want"), [([1, 1, 0], 1.5), ([0, 0, 0], 4 / 3), ([1, 1e-9, 0], 1), ([np.nan, 1, 1], 4 / 3)]
)
def test_what_is_unimportant_is_left_out_of_the_mean_unless_all_is(importance, want):
    np.testing.assert_allclose(
        mean_by_importance(jnp.array([1.0, 2, 1]), jnp.array(importance, float)), want, rtol=2e-6
    )
