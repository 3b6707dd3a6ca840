"""Cross-entropy and κ in one pass: values, and derivatives of either mode and order, are those of the dense form."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import flatjax

D, M, N, TILE = 8, 3, 6, 3  # The last tile is of the rows 5, 6 and 7, the first of which was read before.


def problem_of(d=D, m=M, n=N, seed=0):
    """No sample of weight 0: what is padding there is none a step ahead."""
    problem = helpers.random_problem(d, m, (n,), seed=seed)
    return problem._replace(weights=problem.weights + 0.1)


def point_of(problem):
    return problem.weight, problem.bias, problem.feats, problem.weights


def tiled_values(point, labels, *, tile_size=TILE):
    weight, bias, feats, weights = point
    params = {"embedding": weight, "bias": bias}
    return jnp.stack(flatjax.cross_entropy_and_flatness(params, feats, labels, weights=weights, tile_size=tile_size))


def dense_values(point, labels):
    """From all logits, κ as the mean of ‖φ‖² times the variance of the rows."""
    weight, bias, feats, weights = point

    def of_sample(phi, label):
        logits = weight @ phi + bias
        p = jax.nn.softmax(logits)
        variance = p @ jnp.sum((weight - (p @ weight)[None]) ** 2, axis=1)
        return jnp.stack([helpers.softmax_cross_entropy(logits, label), phi @ phi * variance])

    return weights / jnp.sum(weights) @ jax.vmap(of_sample)(feats, labels)


def with_gradient(values):
    """Both values, and the gradient of a mixture of them."""

    def mixed(point, mixture, labels, **options):
        both = values(point, labels, **options)
        return mixture @ both, both

    @functools.partial(jax.jit, static_argnames="tile_size")
    def values_and_gradient(point, mixture, labels, **options):
        (_, both), gradient = jax.value_and_grad(mixed, has_aux=True)(point, mixture, labels, **options)
        return both, *gradient

    return values_and_gradient


tiled, dense = with_gradient(tiled_values), with_gradient(dense_values)
MIXTURES = [np.array(mixture) for mixture in [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3), (1.0, -0.3)]]
SHARP = MIXTURES[3]


def assert_close(got, want, rtol):
    """To `rtol` of the largest entry of an array, if that is above 1."""
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(y))
        np.testing.assert_allclose(np.asarray(x, float), y, rtol=rtol, atol=rtol * max(1, np.max(np.abs(y))))


def assert_each_row_close(got, want, rtol):
    for x, y in zip(got, want, strict=True):
        errors = np.linalg.norm(np.atleast_2d(np.asarray(x, float) - y), axis=1)
        assert np.all(errors <= rtol * np.linalg.norm(np.atleast_2d(y), axis=1))


def test_the_oracles_agree():
    problem = problem_of()
    want = helpers.dense_flatness(helpers.softmax_cross_entropy, problem).kappa
    np.testing.assert_allclose(dense(point_of(problem), SHARP, problem.labels)[0][1], want, rtol=1e-13)


@pytest.mark.parametrize(("d", "m", "n", "tile_size"), [(1, 2, 3, 1), (2, 3, 1, 1), (D, M, N, TILE)])
def test_values_and_gradients_are_those_of_the_dense_form(d, m, n, tile_size):
    problem = problem_of(d, m, n)
    for mixture in MIXTURES:
        got = tiled(point_of(problem), mixture, problem.labels, tile_size=tile_size)
        assert got[0].dtype == jnp.float64
        assert_close(got, dense(point_of(problem), mixture, problem.labels), 1e-13)


@pytest.mark.parametrize(("layout", "leading"), [("kernel", ()), ("embedding", (2, 3))])
def test_a_head_without_bias_and_samples_of_any_leading_shape_are_read(layout, leading):
    problem = helpers.random_problem(D, M, leading)
    params = {layout: problem.weight.T if layout == "kernel" else problem.weight}
    read = jax.jit(functools.partial(flatjax.cross_entropy_and_flatness, tile_size=TILE))
    point = (problem.weight, np.zeros(D), problem.feats.reshape(-1, M), np.ones(problem.labels.size))
    assert_close(read(params, problem.feats, problem.labels), [*dense_values(point, problem.labels.reshape(-1))], 1e-13)


@pytest.mark.parametrize(("d", "m", "n", "tile_size"), [(1000, 16, 33, 96), (50257, 4, 3, 4096)])
def test_a_vocabulary_is_read_in_float32(d, m, n, tile_size):
    problem = problem_of(d, m, n).astype(np.float32)
    got = tiled(point_of(problem), np.float32([1, 0.3]), problem.labels, tile_size=tile_size)
    want = dense(point_of(problem.astype(np.float64)), np.array([1, 0.3]), problem.labels)
    np.testing.assert_allclose(got[0], want[0], rtol=2e-6)
    assert_each_row_close(got, want, 5e-5)


def test_gradients_are_those_of_finite_differences():
    problem, step = problem_of(), 1e-5
    point, labels = point_of(problem), problem.labels
    direction = direction_at(point)

    def values_at(t):
        return tiled(jax.tree.map(lambda x, v: x + t * v, point, direction), SHARP, labels)[0]

    differences = (values_at(step) - values_at(-step)) / (2 * step)
    for mixture in MIXTURES:
        got = sum(map(np.vdot, tiled(point, mixture, labels)[1:], direction))
        np.testing.assert_allclose(got, mixture @ differences, rtol=1e-7)


def direction_at(point):
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=x.shape) for x in point)


def loss_without_cancellation(problem):
    """The loss and its gradient in float64, p_y − 1 from the sum of the other probabilities."""
    weight, bias, feats, labels, _ = problem.astype(np.float64)
    logits = feats @ weight.T + bias
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    is_label = np.eye(len(weight), dtype=bool)[labels]
    others = np.where(is_label, 0, p)
    rest = others.sum(axis=1, keepdims=True)
    residuals = np.where(is_label, -rest, p) / len(feats)
    by_feats = (others @ weight - rest * weight[labels]) / len(feats)
    return np.mean(-np.log1p(-rest)), (residuals.T @ feats, residuals.sum(axis=0), by_feats)


# From a loss of 4e-3 to 1e-25, and from κ = 0.5 to 7e-22. Float32 knows a logit of 60 to 4e-6.
@pytest.mark.parametrize(("scale", "rtol"), [(8, 5e-6), (20, 1e-5), (30, 1e-5), (60, 2e-5)])
def test_float32_keeps_the_gradients_and_the_loss_of_a_collapsed_head(scale, rtol):
    problem = helpers.collapsed_problem(13, 16, 40, scale)
    loss, by_loss = loss_without_cancellation(problem)
    by_kappa = helpers.kappa_gradient_without_cancellation(problem)
    kappa = helpers.softmax_flatness_without_cancellation(problem).kappa
    for mixture, gradient in zip(np.eye(2, dtype=np.float32), (by_loss, by_kappa), strict=True):
        values, *got = tiled(point_of(problem), mixture, problem.labels, tile_size=5)
        np.testing.assert_allclose(values, [loss, kappa], rtol=rtol, atol=0)
        assert all(x.dtype == jnp.float32 for x in got)
        assert_each_row_close(got[:3], gradient, rtol)


PRODUCTS = {
    "forward over reverse": lambda f, x, v: jax.jvp(jax.grad(f), (x,), (v,))[1],
    "reverse over forward": lambda f, x, v: jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x),
    "reverse over reverse": lambda f, x, v: jax.grad(lambda x: sum(map(jnp.vdot, jax.grad(f)(x), v)))(x),
    "linear in the direction, not compiled": lambda f, x, v: jax.linearize(jax.grad(jax.checkpoint(f)), x)[1](v),
}


def hessian_product(name, values):
    """Of a mixture of values with a direction."""

    def product(point, mixture, labels, direction):
        return PRODUCTS[name](lambda point: mixture @ values(point, labels), point, direction)

    return product


dense_product = jax.jit(hessian_product("forward over reverse", dense_values))


@pytest.mark.parametrize("name", PRODUCTS)
def test_hessian_vector_products_of_any_mode_are_those_of_the_dense_form(name):
    problem = problem_of()
    point, direction = (jax.tree.map(jnp.asarray, x) for x in (point_of(problem), direction_at(point_of(problem))))
    product = hessian_product(name, tiled_values)
    product, mixtures = (product, [SHARP]) if "not compiled" in name else (jax.jit(product), MIXTURES)
    for mixture in mixtures:
        want = dense_product(point, mixture, problem.labels, direction)
        assert_close(product(point, mixture, problem.labels, direction), want, 1e-13)


def test_the_hessian_is_that_of_the_dense_form():
    problem = problem_of(3, 2, 2)
    got, want = (
        jax.jit(jax.hessian(values))(point_of(problem), problem.labels) for values in (tiled_values, dense_values)
    )
    assert_close(got, want, 1e-13)


def test_batches_in_a_scan_add_up_to_the_whole():
    problem = helpers.random_problem(D, M, (4, N))
    feats, labels, weights = problem[2:]

    def total(head):
        def add_batch(sums, batch):
            feats, labels, weights = batch
            return sums + jnp.sum(weights) * tiled_values((*head, feats, weights), labels), None

        sums = jax.lax.scan(jax.checkpoint(add_batch), jnp.zeros(2), (feats, labels, weights))[0]
        return SHARP @ sums / np.sum(weights), sums / np.sum(weights)

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(problem[:2])
    want = dense((*problem[:2], feats.reshape(-1, M), weights.reshape(-1)), SHARP, labels.reshape(-1))
    assert_close([values, *gradient], want[:3], 1e-13)


@pytest.mark.parametrize("axes", [(0, 0, None, None), (None, None, 0, 0)], ids=["heads", "batches"])
def test_vmap_is_a_loop(axes):
    problem, other = problem_of(), point_of(problem_of(seed=1))
    first = point_of(problem)
    points = first, tuple(y if axis == 0 else x for x, y, axis in zip(first, other, axes, strict=True))
    stacked = tuple(np.stack([x, y]) if axis == 0 else x for x, y, axis in zip(*points, axes, strict=True))
    got = jax.vmap(lambda point: tiled(point, SHARP, problem.labels), in_axes=(axes,))(stacked)
    for i, point in enumerate(points):
        assert_close([x[i] for x in got], dense(point, SHARP, problem.labels), 1e-13)


def test_kappa_is_an_auxiliary_of_the_loss():
    problem = problem_of()
    read = functools.partial(flatjax.cross_entropy_and_flatness, weights=problem.weights)
    step = jax.jit(jax.value_and_grad(read, has_aux=True))
    values, gradient = step(problem.params, problem.feats, problem.labels)
    want = dense(point_of(problem), MIXTURES[0], problem.labels)
    assert_close([jnp.stack(values), gradient["kernel"].T, gradient["bias"]], want[:3], 1e-13)


def test_nothing_is_sensitive_to_what_an_ignored_sample_holds():
    weight, bias, feats, weights = point_of(problem_of())
    labels, kept = problem_of().labels, [1, 2, 4, 5]
    wants = [dense((weight, bias, feats[kept], weights[kept]), mixture, labels[kept]) for mixture in MIXTURES]
    feats[[0, 3]], labels[[0, 3]], weights[[0, 3]] = np.nan, [-100, 10**9], [1, 0]
    for mixture, want in zip(MIXTURES, wants, strict=True):
        *got, by_feats, by_weights = tiled((weight, bias, feats, weights), mixture, labels)
        assert_close([*got, by_feats[kept,], by_weights[kept,]], want, 1e-13)
        assert not np.any(by_feats[[0, 3],])
        assert not np.any(by_weights[[0, 3],])


NOT_A_NUMBER = [(name, 5, np.nan) for name in ("weight", "bias", "feats", "weights")]
OUT_OF_RANGE = [("labels", 5, D), ("labels", 5, -1), ("weights", 5, -1)]
NOTHING_BUT_PADDING = [("labels", slice(N), -100), ("weights", slice(N), 0)]


@pytest.mark.parametrize(("name", "place", "value"), [*NOT_A_NUMBER, *OUT_OF_RANGE, *NOTHING_BUT_PADDING])
def test_a_bad_value_or_nothing_but_padding_makes_loss_and_kappa_nan(name, place, value):
    problem = problem_of()
    getattr(problem, name).flat[place] = value
    assert np.all(np.isnan(tiled(point_of(problem), SHARP, problem.labels)[0]))


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "float16")])
def test_gradients_have_the_dtypes_of_the_inputs_and_are_rounded_to_them_once(dtypes):
    weight, bias, feats, labels, weights = problem_of(23, 4, 99)
    dtypes = (dtypes[0], dtypes[0], dtypes[1], "float32")
    point = tuple(jnp.asarray(x, dtype) for x, dtype in zip((weight, bias, feats, weights), dtypes, strict=True))
    for mixture in np.eye(2):
        values, *got = tiled(point, mixture.astype(np.float32), labels, tile_size=5)
        exact, *want = dense(tuple(x.astype(float) for x in point), mixture, labels)
        assert values.dtype == jnp.float32
        np.testing.assert_allclose(values, exact, rtol=2e-6)
        for x, y, dtype in zip(got, want, dtypes, strict=True):
            assert x.dtype == dtype
            rounding = 0.5 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(x.astype(float), y, rtol=1.01 * rounding, atol=2e-6 * np.max(np.abs(y)))


def test_labels_of_int32_are_as_good_as_those_of_int64():
    problem = problem_of()
    got, want = (tiled(point_of(problem), SHARP, problem.labels.astype(dtype)) for dtype in ("int32", "int64"))
    assert_close(got, want, 1e-15)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"tile_size": 0}, ValueError, "tile_size is 0, wanted at least 1"),
        ({"tile_size": 2.5}, TypeError, "tile_size is a float, wanted a number of rows"),
        ({"labels": np.zeros(N)}, TypeError, "labels has dtype float64"),
        ({"labels": np.full((N, D), 1 / D)}, TypeError, "wanted one integer class a sample"),
        ({"labels": np.zeros((N, D), int)}, TypeError, "wanted one integer class a sample"),
        ({"labels": np.zeros(N - 1, int)}, ValueError, "labels has shape"),
        ({"feats": np.zeros((N, M + 1))}, ValueError, "feats has shape"),
        ({"weights": np.zeros(N + 1)}, ValueError, "weights has shape"),
        ({"axis_name": "x"}, ValueError, "the axis 'x' of axis_name splits neither the head nor feats"),
    ],
)
def test_what_does_not_fit_is_refused_while_tracing(change, error, match):
    problem = problem_of()
    arrays = {"params": problem.params, "feats": problem.feats, "labels": problem.labels} | change
    options = {name: arrays.pop(name, None) for name in ("tile_size", "axis_name")}
    with helpers.raises(error, match):
        jax.eval_shape(lambda arrays: flatjax.cross_entropy_and_flatness(**arrays, **options), arrays)


def all_in_tiles(tile_size):
    def total(params, feats, labels, weights):
        options = {"weights": weights, "tile_size": tile_size}
        kappa = flatjax.relative_flatness(params, feats, labels, **options)
        kappa += flatjax.simplified_relative_flatness(params, feats, labels, **options)
        return kappa + sum(flatjax.cross_entropy_and_flatness(params, feats, labels, **options))

    return total


def arguments(d=D, m=M, n=N):
    _, _, feats, labels, weights = problem = problem_of(d, m, n).astype(np.float32)
    return problem.params, feats, labels, weights


def gradients(function):
    return jax.value_and_grad(function, argnums=(0, 1, 3))


def product_with_itself(function):
    """Of a head and the Hessian in it."""
    return lambda head, *samples: jax.jvp(jax.grad(lambda head: function(head, *samples)), (head,), (head,))


def equations_in(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params):
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                yield from equations_in(getattr(parameter, "jaxpr", parameter))


@pytest.mark.parametrize("derivative", [lambda f: f, gradients, product_with_itself], ids=["value", "first", "second"])
@pytest.mark.parametrize(("d", "n", "tile_size"), [(60, 50, 8), (50257, 200, None)])
def test_logits_in_tiles_are_never_all_in_memory_and_made_in_full_precision(d, n, tile_size, derivative):
    jaxpr = jax.make_jaxpr(derivative(all_in_tiles(tile_size)))(*arguments(d, 4, n)).jaxpr
    sizes = [variable.aval.size for equation in equations_in(jaxpr) for variable in equation.outvars]
    assert 4 * d in sizes
    assert max(sizes) < n * d
    products = [equation for equation in equations_in(jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) > 8
    assert all(product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for product in products)


def test_tiles_and_their_gradients_are_exported_for_every_platform():
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(gradients(all_in_tiles(TILE))), platforms=platforms)(*arguments())
    assert exported.platforms == platforms
    assert_close(exported.call(*arguments()), jax.jit(gradients(all_in_tiles(None)))(*arguments()), 2e-6)


@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
@pytest.mark.parametrize("scale", [20, 60])
def test_float32_keeps_hessian_vector_products_of_certain_samples(scale, mode):
    problem = helpers.collapsed_problem(13, 16, 40, scale)
    rng = np.random.default_rng(0)
    direction = rng.normal(size=problem.weight.shape).astype(np.float32), rng.normal(size=problem.feats.shape)

    def product(dtype):
        weight, bias, feats, labels, _ = problem.astype(dtype)
        along = tuple(x.astype(dtype) for x in direction)

        def objective(weight, feats):
            values = flatjax.cross_entropy_and_flatness({"embedding": weight, "bias": bias}, feats, labels, tile_size=5)
            return values[0] + values[1]

        gradient = jax.grad(objective, (0, 1))
        if mode == "forward over reverse":
            return jax.jit(lambda *point: jax.jvp(gradient, point, along)[1])(weight, feats)
        inner = lambda *point: sum(jnp.vdot(g, x) for g, x in zip(gradient(*point), along, strict=True))  # noqa: E731
        return jax.jit(jax.grad(inner, (0, 1)))(weight, feats)

    for got, want in zip(product(np.float32), product(np.float64), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.max(np.abs(want)))
