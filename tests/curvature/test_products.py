"""Products with the Hessian and the Gauss-Newton matrix are those of dense matrices, of any leaves, in any batches."""

import flax.linen
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flatjax.curvature.products import Curvature, GaussNewton, Hessian, product
from flatjax.curvature.streams import Streamed
from flatjax.curvature.vectors import inner_product, rademacher_like

from . import cases

PATHS = [None, ("head/kernel",), ("head/bias", "hidden/kernel")]


def assert_products(curvature, matrix, rtol=1e-13, **options):
    vectors = cases.random_vectors(curvature.like)
    got = curvature.products(vectors, **options)
    assert jax.tree.structure(got) == jax.tree.structure(curvature.like)
    want = cases.ravelled(vectors) @ matrix
    np.testing.assert_allclose(cases.ravelled(got), want, rtol=rtol, atol=rtol * np.max(np.abs(want)))


@pytest.mark.parametrize("paths", PATHS)
def test_hessian_products_are_those_of_the_dense_hessian(paths):
    hessian = cases.mlp_hessian(leaves=paths)
    assert isinstance(hessian, Curvature)
    assert_products(hessian, cases.mlp_matrix(paths))


@pytest.mark.parametrize("paths", PATHS)
def test_gauss_newton_products_are_those_of_the_dense_matrix(paths):
    matrix = cases.mlp_gauss_newton(leaves=paths)
    assert isinstance(matrix, Curvature)
    want = cases.dense_gauss_newton(cases.predict, cases.mean_loss, matrix.params, matrix.batch, paths)
    assert_products(matrix, want)


def test_gauss_newton_differs_from_the_hessian_in_a_hidden_layer_and_not_in_the_head():
    for paths, same in [(("head/kernel",), True), (("hidden/kernel",), False)]:
        hessian, matrix = cases.mlp_hessian(leaves=paths), cases.mlp_gauss_newton(leaves=paths)
        vectors = cases.random_vectors(hessian.like)
        products = [cases.ravelled(curvature.products(vectors)) for curvature in (hessian, matrix)]
        assert np.allclose(*products, rtol=1e-12) == same


@pytest.mark.parametrize("chunk_size", [2, 5])
def test_the_size_of_a_chunk_changes_nothing(chunk_size):
    assert_products(cases.mlp_hessian(), cases.mlp_matrix(), chunk_size=chunk_size)


def test_one_product_under_vmap_and_jit_is_one_of_several():
    hessian = cases.mlp_hessian()
    vectors = cases.random_vectors(hessian.like)
    want = cases.ravelled(hessian.products(vectors))
    got = jax.jit(lambda hessian, vectors: jax.vmap(lambda vector: product(hessian, vector))(vectors))(hessian, vectors)
    np.testing.assert_allclose(cases.ravelled(got), want, rtol=1e-12, atol=1e-14)


class Network(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def nnx_loss(graphdef):
    return lambda params, x, y: cases.mean_loss(nnx.merge(graphdef, params)(x), x, y)


@pytest.mark.parametrize("paths", [None, ("layers/1/kernel", "layers/0/bias")])
def test_a_network_of_nnx_has_the_products_of_its_dense_hessian(paths):
    graphdef, params = nnx.split(Network(nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    batch = cases.samples()
    plain = {f"layers_{i}": {name: params["layers"][i][name][...] for name in ("kernel", "bias")} for i in (0, 1)}

    def plain_loss(params, x, y):
        named = {"hidden": params["layers_0"], "head": params["layers_1"]}
        return cases.loss_fn(named, x, y)

    plain_paths = ("layers_0/bias", "layers_1/kernel") if paths else None
    matrix = cases.dense_hessian(plain_loss, plain, batch, plain_paths)
    assert_products(Hessian(nnx_loss(graphdef), params, batch, paths), matrix)


class LinenNetwork(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = jnp.tanh(flax.linen.Dense(4, param_dtype=jnp.float64, name="hidden")(x))
        return flax.linen.Dense(2, param_dtype=jnp.float64, name="head")(x)


@pytest.mark.parametrize("paths", [None, ("hidden/kernel",)])
def test_a_network_of_linen_has_the_products_of_its_dense_hessian(paths):
    batch = cases.samples()
    params = LinenNetwork().init(jax.random.key(0), batch[0])["params"]

    def loss(params, x, y):
        return cases.mean_loss(LinenNetwork().apply({"params": params}, x), x, y)

    assert_products(Hessian(loss, params, batch, paths), cases.dense_hessian(cases.loss_fn, params, batch, paths))


# A data set in batches.


def batches_of(x, y, sizes):
    stops = np.cumsum(sizes)
    return [(x[stop - size : stop], y[stop - size : stop]) for size, stop in zip(sizes, stops, strict=True)]


def streamed(batches, count=None, params=None):
    params = cases.mlp_params() if params is None else params
    return Streamed(lambda x, y: Hessian(cases.loss_fn, params, (x, y)), batches, count)


@pytest.mark.parametrize("sizes", [(9,), (1, 2, 6)])
def test_batches_of_any_sizes_make_up_the_whole_data_set(sizes):
    x, y = cases.samples(9)
    curvature = streamed(batches_of(x, y, sizes))
    assert isinstance(curvature, Curvature)
    assert_products(curvature, cases.mlp_matrix(n=9), 2e-14, chunk_size=2)


def test_a_count_says_how_many_samples_a_batch_is_the_mean_of():
    x, y = cases.samples(9)
    weights = np.array([1.0, 0, 1, 1, 1, 1, 0, 0, 1])

    def loss(params, x, y, w):
        logits = cases.predict(params, x, y)
        losses = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return jnp.sum(w * losses) / jnp.sum(w)

    params, batches = cases.mlp_params(), [(x[s], y[s], weights[s]) for s in (slice(0, 2), slice(2, 9))]
    curvature = Streamed(lambda *batch: Hessian(loss, params, batch), batches, count=lambda x, y, w: np.sum(w))
    kept = weights > 0
    assert_products(curvature, cases.dense_hessian(cases.loss_fn, params, (x[kept], y[kept])), 2e-14)


def test_a_batch_is_compiled_for_once_a_shape():
    x, y = cases.samples(12)
    traced = []

    def loss(params, x, y):
        traced.append(len(x))
        return cases.loss_fn(params, x, y)

    params = cases.mlp_params()
    curvature = Streamed(lambda x, y: Hessian(loss, params, (x, y)), batches_of(x, y, (4, 4, 3, 1)))
    curvature.products(cases.random_vectors(params))
    once = len(traced)
    curvature.products(cases.random_vectors(params, seed=3))
    assert set(traced) == {4, 3, 1}
    assert len(traced) == once


def test_batches_that_are_used_up_are_refused():
    with helpers.raises(TypeError, r"batches is an iterator \(generator\)"):
        streamed(batch for batch in [cases.samples()])


def test_no_batches_and_no_samples_are_refused():
    vectors = cases.random_vectors(cases.mlp_params())
    with helpers.raises(ValueError, "batches is empty"):
        streamed([]).products(vectors)
    with helpers.raises(ValueError, "batches is empty"):
        _ = streamed([]).like
    with helpers.raises(ValueError, "no samples that count"):
        streamed([cases.samples(2)], count=lambda x, y: 0).products(vectors)


# Precision, memory, errors.


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (
            lambda loss, w: (loss, w),
            r"loss_fn returned tuple, wanted a scalar .* lambda \*args: loss_fn\(\*args\)\[0\]",
        ),
        (lambda loss, w: {"loss": loss}, "loss_fn returned dict, wanted a scalar"),
        (lambda loss, w: w, r"loss_fn returned float64\(3,\), wanted a scalar .* the mean over the samples"),
        (lambda loss, w: jnp.sum(w > 0), r"loss_fn returned int64\(\), wanted a scalar of a floating dtype"),
        (lambda loss, w: None, "loss_fn returned NoneType, wanted a scalar"),
    ],
)
def test_a_loss_that_is_no_scalar_is_refused_with_what_to_do(returned, match):
    w = jnp.arange(3.0)
    curvatures = (
        Hessian(lambda w: returned(jnp.sum(w**2), w), w),
        GaussNewton(lambda w: w, lambda z: returned(jnp.sum(z**2), z), w),
    )
    for curvature in curvatures:
        with helpers.raises(TypeError, match):
            curvature.products(w[None])
    first = Hessian(lambda w: returned(jnp.sum(w**2), w)[0], w) if "tuple" in match else Hessian(lambda w: 3.0, w)
    want = 2 * w if "tuple" in match else 0 * w
    np.testing.assert_array_equal(first.products(w[None])[0], want)


def test_bfloat16_leaves_have_products_in_float32_as_exact_as_the_network_is():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), cases.mlp_params())
    x, y = cases.samples()

    def loss(params, x, y):
        return cases.loss_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), x, y)

    hessian = Hessian(loss, params, (x.astype(np.float32), y))
    draw = jax.jit(jax.vmap(lambda key: rademacher_like(hessian.like, key)))
    vectors = draw(jax.random.split(jax.random.key(0), 5))
    got = hessian.products(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), vectors))
    assert {leaf.dtype for leaf in jax.tree.leaves((got, hessian.like))} == {jnp.dtype(jnp.float32)}
    exact = cases.dense_hessian(cases.loss_fn, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), (x, y))
    want = cases.ravelled(vectors) @ exact
    # Each product is rounded to the dtype of its leaf once.
    np.testing.assert_allclose(cases.ravelled(got), want, rtol=2**-8, atol=1e-6)


def test_leaves_of_several_dtypes_keep_them():
    params = cases.mlp_params()
    params["head"] = jax.tree.map(lambda leaf: leaf.astype(np.float32), params["head"])
    x, y = cases.samples()

    def loss(params, x, y):
        return cases.loss_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), x, y)

    hessian = Hessian(loss, params, (x, y))
    assert hessian.products(cases.random_vectors(params))["head"]["kernel"].dtype == jnp.float32
    assert_products(hessian, cases.mlp_matrix(), 1e-6)


def temp_bytes(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("make", [Hessian, GaussNewton])
def test_memory_does_not_grow_with_the_number_of_vectors(make):
    widths = (30, 200, 10)
    params, batch = cases.mlp_params(widths), cases.samples(3, widths)
    losses = (cases.loss_fn,) if make is Hessian else (cases.predict, cases.mean_loss)
    curvature = make(*losses, params, batch)
    one_vector = sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    def products(k, **options):
        vectors = cases.random_vectors(params, k)
        return temp_bytes(lambda c, v: c.products(v, **options), curvature, vectors)

    def probes(k):
        keys = jax.random.split(jax.random.key(0), k)
        return temp_bytes(lambda c, keys: c.forms(rademacher_like, inner_product, keys), curvature, keys)

    few, many = products(4), products(64)
    assert many - few < one_vector / 10
    if make is Hessian:  # The loops are the same.
        assert probes(64) - probes(4) < one_vector / 10
        assert products(64, chunk_size=32) - many > 10 * one_vector  # or this measures nothing


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"leaves": ("head/weight",)}, ValueError, "no leaf at 'head/weight', but at 'head/bias', 'head/kernel'"),
        ({"leaves": ()}, ValueError, "no leaf of params is chosen"),
        ({"leaves": "head/kernel"}, TypeError, "leaves is 'head/kernel', wanted a tuple of paths"),
        ({"params": {"step": np.arange(2)}}, TypeError, "'step' a leaf of dtype int64, wanted a floating dtype"),
        ({"loss_fn": cases.predict}, TypeError, r"loss_fn returned float64\(7, 2\), wanted a scalar"),
    ],
)
def test_what_has_no_hessian_is_refused(change, error, match):
    arguments = {"loss_fn": cases.loss_fn, "params": cases.mlp_params(), "batch": cases.samples()} | change
    with helpers.raises(error, match):
        hessian = Hessian(**arguments)
        hessian.products(cases.random_vectors(arguments["params"]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda vectors: vectors["head"], "wanted one like the chosen leaves"),
        (lambda vectors: jax.tree.map(lambda leaf: leaf[:, :1], vectors), r"vectors has at 'head/bias' the shape"),
    ],
)
def test_vectors_unlike_the_leaves_are_refused(change, match):
    hessian = cases.mlp_hessian()
    with helpers.raises(ValueError, match):
        hessian.products(change(cases.random_vectors(hessian.like)))
    with helpers.raises(ValueError, "chunk_size is 0"):
        hessian.products(cases.random_vectors(hessian.like), chunk_size=0)
