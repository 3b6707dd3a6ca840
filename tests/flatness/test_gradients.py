"""Derivatives of flatness: against finite differences, in float32 at κ ≈ 1e-20, and where they are easily NaN."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import flatjax


def random_problem(d, m, n):
    """No sample of weight 0: what is padding there is none a step ahead."""
    problem = helpers.random_problem(d, m, (n,))
    return problem._replace(weights=problem.weights + 0.1)


@functools.partial(jax.jit, static_argnames="loss")
def four_numbers(weight, bias, feats, weights, *, labels, loss):
    """κ, κ̂, κ_max, and T in one number that its symmetry does not bring to 0."""
    got = helpers.measured_flatness({"kernel": weight.T, "bias": bias}, feats, labels, weights=weights, loss=loss)
    coefficients = np.random.default_rng(0).normal(size=got.traces.shape).astype(got.traces.dtype)
    return jnp.stack([got.kappa, got.simplified, got.maximal, jnp.sum(coefficients * got.traces)])


@functools.partial(jax.jit, static_argnames="loss")
def jacobians(*args, labels, loss):
    """Of the four in the weight, bias, features and sample weights."""
    return jax.jacrev(functools.partial(four_numbers, labels=labels, loss=loss), argnums=(0, 1, 2, 3))(*args)


# Over the pairs of few rows, and around the largest logit of many.
SOFTMAX = [(3, 5, 9, "softmax_cross_entropy"), (6, 4, 5, "softmax_cross_entropy")]
CASES = [*SOFTMAX, (3, 5, 9, "squared_error"), (3, 5, 9, "sigmoid_cross_entropy"), (3, 5, 9, helpers.focal)]


def random_direction(point, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=x.shape) for x in point)


def difference_along(function, point, direction, step):
    """Central, so right to step²."""
    ahead, behind = (
        function(*(x + sign * step * v for x, v in zip(point, direction, strict=True))) for sign in (1, -1)
    )
    return jax.tree.map(lambda above, below: (np.asarray(above) - np.asarray(below)) / (2 * step), ahead, behind)


@pytest.mark.parametrize(("d", "m", "n", "loss"), SOFTMAX)
def test_forward_derivatives_are_those_of_finite_differences(d, m, n, loss):
    weight, bias, feats, labels, weights = random_problem(d, m, n)
    function = functools.partial(four_numbers, labels=labels, loss=loss)
    point = (weight, bias, feats, weights)
    check_grads(function, point, order=1, modes=["fwd"], atol=1e-6, rtol=1e-6, eps=1e-5)


@functools.partial(jax.jit, static_argnames="loss")
def gradient_of_kappa(weight, bias, feats, weights, *, labels, loss):
    def kappa(weight, bias, feats, weights):
        return flatjax.relative_flatness({"embedding": weight, "bias": bias}, feats, labels, weights=weights, loss=loss)

    return jax.grad(kappa, argnums=(0, 1, 2, 3))(weight, bias, feats, weights)


# Mostly of κ alone, to spare the compiler: of a callable it is the fourth derivative of the loss.
@pytest.mark.parametrize(
    ("case", "derivative"), [(CASES[0], gradient_of_kappa), (CASES[1], jacobians), (CASES[4], gradient_of_kappa)]
)
def test_hessian_vector_products_are_those_of_finite_differences(case, derivative):
    d, m, n, loss = case
    weight, bias, feats, labels, weights = random_problem(d, m, n)
    point = (weight, bias, feats, weights)
    direction = random_direction(point)
    derivative = functools.partial(derivative, labels=labels, loss=loss)
    products = jax.jvp(derivative, point, direction)[1]
    for product, difference in zip(products, difference_along(derivative, point, direction, 1e-5), strict=True):
        np.testing.assert_allclose(product, difference, rtol=1e-6, atol=1e-7 * np.max(np.abs(difference)))


COLLAPSED = [(5, 12, 20), (7, 9, 21)]  # Over the pairs, and around the largest logit.


# At κ of 1, 1e-8 and 1e-19. Logits of 55 are known to 4e-6 in float32.
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-12), ("float32", 2e-5)])
@pytest.mark.parametrize("scale", [5, 30, 55])
@pytest.mark.parametrize(("d", "m", "n"), COLLAPSED)
def test_the_gradient_of_kappa_does_not_cancel_in_a_collapsed_head(d, m, n, scale, dtype, rtol):
    problem = helpers.collapsed_problem(d, m, n, scale)
    want = helpers.kappa_gradient_without_cancellation(problem)
    weight, bias, feats, labels, weights = problem.astype(dtype)
    got = gradient_of_kappa(weight, bias, feats, weights, labels=labels, loss="softmax_cross_entropy")[:3]
    for x, y in zip(got, want, strict=True):
        assert x.dtype == dtype
        assert np.linalg.norm(np.asarray(x, float) - y) < rtol * np.linalg.norm(y)


@pytest.mark.parametrize("scale", [30, 55])
def test_float32_keeps_the_gradient_of_every_metric_of_a_collapsed_head(scale):
    problem = helpers.collapsed_problem(7, 9, 21, scale)

    def gradients(problem):
        point = (problem.weight, problem.bias, problem.feats, problem.weights)
        return jacobians(*point, labels=problem.labels, loss="softmax_cross_entropy")

    for got, want in zip(gradients(problem), gradients(problem.astype(np.float64)), strict=True):
        errors = np.linalg.norm((np.asarray(got, float) - want).reshape(4, -1), axis=1)
        assert np.all(errors < 2e-5 * np.linalg.norm(np.reshape(want, (4, -1)), axis=1))


def special_points(d, m, n):
    problem = random_problem(d, m, n)
    tied = problem.weight.copy()
    tied[1] = tied[0]
    zero = np.zeros(d)
    return {
        "generic": problem,
        "no weight": problem._replace(weight=0 * problem.weight, bias=zero),
        "equal rows": problem._replace(weight=np.repeat(problem.weight[:1], d, axis=0), bias=zero),
        "tied logits": problem._replace(weight=tied, bias=zero),
        "no features": problem._replace(feats=0 * problem.feats),
    }


@pytest.mark.parametrize(("d", "m", "n", "loss"), CASES)
@pytest.mark.parametrize("name", special_points(3, 5, 9))
def test_gradients_are_those_of_finite_differences(name, d, m, n, loss):
    weight, bias, feats, labels, weights = special_points(d, m, n)[name]
    point = (weight, bias, feats, weights)
    direction = random_direction(point)
    got = sum(
        np.sum(jacobian * v[None], axis=tuple(range(1, v.ndim + 1)))
        for jacobian, v in zip(jacobians(*point, labels=labels, loss=loss), direction, strict=True)
    )
    want = difference_along(functools.partial(four_numbers, labels=labels, loss=loss), point, direction, 1e-5)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def collapsed_point(d, m, n):
    """Logits 1e4 for the class and −1e4 for the rest."""
    rows, labels = np.eye(d, m, dtype="float32"), np.arange(n) % d
    return (2e4 * rows, np.full(d, -1e4, "float32"), rows[labels], np.ones(n, "float32")), labels


@pytest.mark.parametrize(("d", "m", "n"), COLLAPSED)
def test_kappa_its_gradient_and_its_curvature_are_zero_at_exact_collapse(d, m, n):
    point, labels = collapsed_point(d, m, n)
    weight, bias, feats, _ = point
    assert jax.jit(flatjax.relative_flatness)({"embedding": weight, "bias": bias}, feats, labels) == 0
    gradient = functools.partial(gradient_of_kappa, labels=labels, loss="softmax_cross_entropy")
    direction = tuple(v.astype("float32") for v in random_direction(point))
    for values in jax.jvp(gradient, point, direction):
        assert all(np.all(x == 0) for x in values)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "sigmoid_cross_entropy"])
def test_every_metric_and_its_gradient_are_zero_at_exact_collapse(loss):
    point, labels = collapsed_point(*COLLAPSED[1])
    assert np.all(four_numbers(*point, labels=labels, loss=loss) == 0)
    assert all(np.all(x == 0) for x in jacobians(*point, labels=labels, loss=loss))


@pytest.mark.parametrize(("d", "m", "n", "loss"), [*CASES, (6, 4, 5, helpers.focal)], ids=helpers.name_of)
def test_where_a_weight_is_zero_its_derivative_is_that_of_the_mean(d, m, n, loss):
    """∂κ/∂ω_i = (κ_i − κ)/Σω, with κ_i that of the sample alone; so with κ̂ and T, but not κ_max."""
    weight, bias, feats, labels, weights = random_problem(d, m, n)
    labels[2] = labels[0]  # to a callable a label is good if it lies between those that count
    weights[2] = 0
    got = jacobians(weight, bias, feats, weights, labels=labels, loss=loss)
    of_all = four_numbers(weight, bias, feats, weights, labels=labels, loss=loss)
    # As many times as there are samples, for a batch of the same size.
    alone = four_numbers(weight, bias, feats[[2] * n], np.ones(n), labels=labels[[2] * n], loss=loss)
    np.testing.assert_allclose(got[3][:, 2][[0, 1, 3],], ((alone - of_all) / weights.sum())[[0, 1, 3],], rtol=1e-10)
    step = 1e-6
    ahead = four_numbers(weight, bias, feats, weights + step * np.eye(n)[2], labels=labels, loss=loss)
    np.testing.assert_allclose(got[3][:, 2], (ahead - of_all) / step, rtol=1e-4)
    assert not np.any(got[2][:, 2])


GARBAGE = {
    "NaN": {"feats": np.nan},
    "infinite": {"feats": np.inf},
    "too large to square": {"feats": 1e200},
    "no class": {"labels": 7},
    "ignored": {"labels": -100},
    "ignored NaN": {"labels": -100, "feats": np.nan},
}


@pytest.mark.parametrize("loss", helpers.NAMED)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_nothing_is_sensitive_to_padding_that_holds_no_sample(garbage, loss):
    weight, bias, feats, labels, weights = random_problem(3, 5, 9)
    weights[4] = 0
    for name, value in GARBAGE[garbage].items():
        {"feats": feats, "labels": labels}[name][4] = value
    got = jacobians(weight, bias, feats, weights, labels=labels, loss=loss)
    kept = np.arange(9) != 4
    want = jacobians(weight, bias, feats[kept], weights[kept], labels=labels[kept], loss=loss)
    for x, y in zip((*got[:2], got[2][:, kept], got[3][:, kept]), want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    assert not np.any(got[2][:, 4])
    assert not np.any(got[3][:, 4])
