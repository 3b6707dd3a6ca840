"""The closed form of softmax cross-entropy where it was made for: confident heads, in float32."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.core.distances import squared_distances, squared_distances_around
from flatjax.flatness.softmax import SoftmaxCurvature
from flatjax.heads import LinearHead

ROUTES = ["variances_over_pairs", "variances_around_the_largest"]


def curvature(problem: helpers.Problem) -> SoftmaxCurvature:
    n = len(problem.feats)
    head = LinearHead(jnp.asarray(problem.weight), jnp.asarray(problem.bias))
    return SoftmaxCurvature(head, jnp.asarray(problem.feats), jnp.full(n, 1 / n, problem.feats.dtype))


@functools.partial(jax.jit, static_argnums=0)
def kappa(route: str, head: SoftmaxCurvature) -> jax.Array:
    return jnp.sum(head.shares * jnp.sum(head.feats**2, axis=1) * getattr(head, route)())


def test_the_oracle_for_confident_heads_agrees_with_the_dense_hessian():
    problem = helpers.collapsed_problem(3, 5, 7, scale=4)
    want = helpers.dense_flatness(helpers.softmax_cross_entropy, problem)
    got = helpers.softmax_flatness_without_cancellation(problem)
    for name in helpers.Flatness._fields:
        # The dense Hessian holds p − p², which has lost e⁴ ≈ 100 of float64's 1e-16.
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-11, err_msg=name)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-13), ("float32", 2e-6)])
@pytest.mark.parametrize(("d", "m", "n"), [(1, 1, 1), (2, 9, 4), (9, 2, 4)])
def test_both_forms_are_the_variance_of_the_rows_under_p(route, dtype, rtol, d, m, n):
    problem = helpers.random_problem(d, m, (n,)).astype(dtype)
    weight, bias, feats, _, _ = problem.astype(np.float64)
    p = np.exp(feats @ weight.T + bias)
    p /= p.sum(axis=1, keepdims=True)
    want = np.einsum("is,isk->i", p, (weight - (p @ weight)[:, None]) ** 2)
    got = jax.jit(lambda head: getattr(head, route)())(curvature(problem))
    np.testing.assert_allclose(got, want, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kept", [3, 1])
def test_a_class_masked_by_a_logit_of_minus_infinity_is_no_class(route, kept):
    problem = helpers.random_problem(4, 5, (7,))
    masked = problem._replace(bias=np.where(np.arange(4) < kept, problem.bias, -np.inf))
    without = problem._replace(weight=problem.weight[:kept], bias=problem.bias[:kept])
    got, gradient = jax.value_and_grad(kappa, argnums=1)(route, curvature(masked))
    np.testing.assert_allclose(got, kappa(route, curvature(without)), rtol=1e-13, atol=1e-30)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("d", "m", "n", "route"), [(4, 8, 8, ROUTES[0]), (5, 8, 8, ROUTES[1]), (1, 1, 1, ROUTES[1])])
def test_kappa_takes_the_form_of_fewer_products(monkeypatch, d, m, n, route):
    class FormTakenError(Exception):
        pass

    def take(_):
        raise FormTakenError

    problem = helpers.random_problem(d, m, (n,))
    monkeypatch.setattr(SoftmaxCurvature, route, take)
    with pytest.raises(FormTakenError):
        curvature(problem).relative_flatness()


# From κ = 4 to κ = 1e-30: the logit of a sample's own class is ahead by the scale. At 97 classes of 128 features the
# other probabilities, 4e-37 at scale 83, are then about to leave float32, whose smallest normal number is 1e-38.
SCALES = [8, 20, 30, 60, 83]


@functools.cache
def collapsed(scale: float) -> tuple[helpers.Problem, helpers.Flatness]:
    problem = helpers.collapsed_problem(97, 128, 512, scale)
    return problem, helpers.softmax_flatness_without_cancellation(problem)


def test_the_collapsed_heads_span_thirty_orders_of_kappa():
    kappas = [collapsed(scale)[1].kappa for scale in SCALES]
    assert kappas[0] > 1
    assert kappas[-1] < 2e-30


# A logit of 83 is known to 5e-6 in float32, and so is each p.
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", SCALES)
def test_float32_keeps_five_digits_of_kappa_in_both_forms(route, scale):
    problem, want = collapsed(scale)
    got = kappa(route, curvature(problem))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want.kappa, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_float32_keeps_every_metric_of_a_collapsed_head(scale):
    problem, want = collapsed(scale)
    got = helpers.measured_flatness(problem.params, problem.feats, problem.labels)
    np.testing.assert_allclose(got.kappa, want.kappa, rtol=1e-5, atol=0)
    np.testing.assert_allclose(got.simplified, want.simplified, rtol=1e-5, atol=0)
    np.testing.assert_allclose(got.maximal, want.maximal, rtol=1e-4, atol=0)
    # A p below float32's smallest normal number is taken for 0.
    underflow = np.finfo(np.float32).tiny * np.mean(np.sum(problem.feats**2, axis=1))
    np.testing.assert_allclose(got.traces, want.traces, rtol=2e-5, atol=underflow)
    assert np.max(np.abs(want.traces)) > 100 * underflow


@pytest.mark.parametrize("scale", SCALES[1:])
def test_the_textbook_variance_loses_in_float32_what_these_forms_keep(scale):
    problem, want = collapsed(scale)
    head = curvature(problem)
    p = jax.nn.softmax(head.head.logits(head.feats))
    rows = head.head.weight
    variances = p @ jnp.sum(rows**2, axis=1) - jnp.sum((p @ rows) ** 2, axis=1)
    textbook = jnp.sum(head.shares * jnp.sum(head.feats**2, axis=1) * variances)
    assert abs(float(textbook) / want.kappa - 1) > 0.1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", SCALES)
def test_float64_keeps_kappa_in_both_forms(route, scale):
    problem, want = collapsed(scale)
    np.testing.assert_allclose(kappa(route, curvature(problem.astype(np.float64))), want.kappa, rtol=1e-13, atol=0)


def paired_rows(d: int, m: int, n: int, scale: float) -> helpers.Problem:
    """Rows in pairs 100 times closer to each other than to the rest, and features that tell pairs apart, not rows."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(d // 2, m)) / np.sqrt(m)
    rows = np.repeat(centres, 2, axis=0) + 0.01 * rng.normal(size=(d, m)) / np.sqrt(m)
    classes = np.arange(n) % d
    problem = helpers.Problem(rows, np.zeros(d), scale * centres[classes // 2], classes, np.ones(n))
    return problem.astype(np.float32)


@pytest.mark.parametrize("route", ROUTES)
def test_float32_keeps_kappa_where_only_rows_near_each_other_are_confused(route):
    problem = paired_rows(96, 128, 512, scale=40)
    want = helpers.softmax_flatness_without_cancellation(problem).kappa
    np.testing.assert_allclose(kappa(route, curvature(problem)), want, rtol=5e-4, atol=0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("nearness", "rtol"), [(1e-3, 1e-5), (1e-5, 1e-2)])
def test_float32_keeps_kappa_where_two_near_rows_are_all_that_matter(route, nearness, rtol):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 8))
    rows[1] = rows[0] + nearness * rng.normal(size=8)
    problem = helpers.Problem(
        rows, np.array([30.0, 30, 0, 0]), rng.normal(size=(16, 8)), np.zeros(16, int), np.ones(16)
    )
    problem = problem.astype(np.float32)
    want = helpers.softmax_flatness_without_cancellation(problem).kappa
    np.testing.assert_allclose(kappa(route, curvature(problem)), want, rtol=rtol, atol=0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("size", [1e3, 1e5])
def test_a_row_without_probability_costs_kappa_no_digits(route, size):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 8))
    rows[3] *= size
    feats = rng.normal(size=(16, 8))
    feats -= np.outer(feats @ rows[3], rows[3]) / np.sum(rows[3] ** 2)
    problem = helpers.Problem(rows, np.array([0, 0, 0, -150.0]), feats, np.zeros(16, int), np.ones(16))
    problem = problem.astype(np.float32)
    want = helpers.softmax_flatness_without_cancellation(problem).kappa
    np.testing.assert_allclose(kappa(route, curvature(problem)), want, rtol=3e-7 * size, atol=0)


DISTANCES = [squared_distances, lambda rows: squared_distances_around(rows, jnp.mean(rows, axis=0))]


@pytest.mark.parametrize("distances", DISTANCES, ids=["from differences", "from products"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_squared_distances_do_not_lose_to_what_all_rows_share(dtype, distances):
    rng = np.random.default_rng(0)
    rows = (1e3 + rng.normal(size=(6, 5))).astype(dtype)
    exact = np.sum((rows[:, None].astype(float) - rows[None].astype(float)) ** 2, axis=-1)
    got = np.asarray(distances(jnp.asarray(rows)))
    # Centring leaves each entry the rounding of a mean of 1e3.
    np.testing.assert_allclose(got, exact, rtol=1e4 * np.finfo(dtype).eps, atol=0)
    np.testing.assert_array_equal(got, got.T)
    assert np.all(np.diag(got) == 0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_squared_distances_of_equal_rows_are_not_negative(dtype):
    row = np.random.default_rng(0).normal(size=(1, 50)).astype(dtype)
    got = np.asarray(squared_distances_around(jnp.asarray(np.repeat(row, 7, axis=0)), jnp.zeros(50, dtype)))
    assert np.all(got >= 0)
    assert np.max(got) <= 10 * np.finfo(dtype).eps * np.sum(row**2)


def test_squared_distances_from_differences_tell_neighbours_apart():
    rows = np.array([[1.0, 1], [1 + 2**-20, 1], [0, 0]], "float32")
    got = squared_distances(jnp.asarray(rows))
    assert got[0, 1] == 2.0**-40
