"""κ^GN of all layers from one reverse pass, against dense Gauss-Newton matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NAMED, raises
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatjax
from flatjax import Layer, TiledLogits, gauss_newton_flatness, gauss_newton_profile
from flatjax.layers.gauss_newton import cotangents, draws, tiled_logits
from flatjax.layers.gauss_newton.profile import Draws, Tally, draws_of_batch
from flatjax.layers.reading.feature_axes import read_layer
from flatjax.layers.reading.program import Program

from .networks import NETWORKS, Network, dense_kappas, perceptron


def with_label(loss):
    """A loss of the logits alone: G of none of those named depends on the label."""
    return lambda logits: NAMED[loss](logits, jnp.zeros((), int))


def numbered(number):
    """A key that says which unit vector is meant."""
    return jax.random.wrap_key_data(jnp.stack([0 * number, number]).astype(jnp.uint32))


def unit(key, shape, dtype):
    """A unit vector in the place of signs: over all of them, squares sum to what they are on average over signs."""
    number = jax.random.key_data(key)[1].astype(int)
    return (jnp.arange(np.prod(shape)) == number).astype(dtype).reshape(shape)


def expected(network, layers, loss, monkeypatch):
    """Σ over all unit vectors in the place of the signs: exactly what the draws are on average, (3, layers)."""
    read = [read_layer(Program.of(draws.sum_of(network.outputs_fn), network.params, network.batch), x) for x in layers]

    monkeypatch.setattr(cotangents, "random_signs", unit)
    pulled = draws.Pulled(network.outputs_fn, network.params, network.batch, read, loss)

    @jax.jit
    def all_of_them(numbers):
        def sizes(number):
            gradients = pulled.gradients(numbered(number))
            return [pulled.sizes(layer, gradients[layer.path]) for layer in read]

        return jax.tree.map(lambda x: x.sum(axis=0), jax.lax.map(sizes, numbers))

    return [np.stack(sizes) for sizes in all_of_them(jnp.arange(pulled.outputs.size))]


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, "softmax_cross_entropy") for name in NETWORKS), ("tanh, weighted", "squared_error"),
     ("stack", "sigmoid_cross_entropy")],
)  # fmt: skip
def test_the_mean_over_draws_is_that_of_the_dense_matrix(name, loss, monkeypatch):
    network = NETWORKS[name]()
    got = expected(network, network.layers, loss, monkeypatch)
    for layer, sizes in zip(network.layers, got, strict=True):
        np.testing.assert_allclose(sizes, dense_kappas(network, layer, with_label(loss)), rtol=1e-9, err_msg=str(layer))


def pseudo_huber(logits):
    return jnp.sum(jnp.sqrt(1 + logits**2)) + 0.1 * jnp.sum(logits) ** 2


def test_a_callable_loss_is_drawn_by_a_root_of_its_hessian(monkeypatch):
    network = NETWORKS["relu"]()
    got = expected(network, network.layers, lambda logits, *_: jax.vmap(pseudo_huber)(logits), monkeypatch)
    for layer, sizes in zip(network.layers, got, strict=True):
        np.testing.assert_allclose(sizes, dense_kappas(network, layer, pseudo_huber), rtol=1e-9)


@pytest.mark.parametrize("name", ["relu", "convolution"])
def test_it_is_kappa_of_a_piecewise_linear_network(name):
    network = NETWORKS[name]()
    labels = jnp.arange(len(network.batch[0])) % 3

    def loss_fn(params, *batch):
        return flatjax.cross_entropy(network.outputs_fn(params, *batch), labels).mean()

    for layer in network.layers:
        of_hessian = flatjax.layer_relative_flatness(
            loss_fn, network.params, *network.batch, layer=layer, method="weights"
        )
        value, _, _ = dense_kappas(network, layer, with_label("softmax_cross_entropy"))
        np.testing.assert_allclose(value, of_hessian.value, rtol=1e-10)


def test_an_embedding_is_measured_as_it_is_looked_up():
    network = NETWORKS["attention"]()
    profile = gauss_newton_profile(network.outputs_fn, network.params, [network.batch], key=jax.random.key(0))
    assert np.isfinite(profile["tokens/embedding"].value)
    want = dense_kappas(network, Layer("tokens/embedding", (0,)), with_label("softmax_cross_entropy"))
    many = gauss_newton_profile(
        network.outputs_fn, network.params, [network.batch], key=jax.random.key(1), layers=["tokens/embedding"],
        num_draws=2000, max_draws=2000,
    )["tokens/embedding"]  # fmt: skip
    assert abs(many.value - want[0, 0]) < 4 * many.standard_error < 0.4 * many.value
    np.testing.assert_allclose(many.trace, want[2, 0], rtol=0.1)


def test_the_errors_of_draws_cover_the_value_of_the_data():
    network = NETWORKS["tanh, weighted"]()
    x, weights = network.batch
    batches = [(x[:4], weights[:4]), (x[4:], weights[4:])]
    want = np.array(
        [dense_kappas(network, layer, with_label("softmax_cross_entropy"))[0, 0] for layer in network.layers]
    )
    z = []
    for seed in range(200):
        profile = gauss_newton_profile(
            network.outputs_fn, network.params, batches, key=jax.random.key(seed), num_draws=16, max_draws=16
        )
        z.append(
            [
                (profile[layer].value - w) / profile[layer].standard_error
                for layer, w in zip(network.layers, want, strict=True)
            ]
        )
    # A t variable of some 30 degrees of freedom; draws are skewed to the right.
    assert np.all(np.mean(np.abs(z) < 2.05, axis=0) > 0.88)
    assert np.all(np.std(z, axis=0) > 0.8)
    assert np.all(np.abs(np.mean(z, axis=0)) < 0.5)


def test_the_errors_over_batches_cover_the_value_of_the_distribution():
    network = NETWORKS["tanh, weighted"]()
    rng = np.random.default_rng(5)
    layers = ["layer0/kernel", "layer2/kernel"]

    def drawn(number):
        """κ^GN by two draws of each of so many batches of 32 samples: the tally of a profile."""
        batches = jnp.asarray(rng.normal(size=(number, 32, 3)))
        keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), (number, 2))
        sizes = jax.device_get(many(batches, keys)[1])
        tally = Tally()
        for i in range(number):
            tally.add(32.0, Draws.of(jax.tree.map(lambda x, i=i: x[i], sizes)))
        return tally.estimates()

    def one_batch(x, keys):
        read = tuple(Layer(path, (0,)) for path in layers)
        return draws_of_batch(
            network.outputs_fn, network.params, (x, jnp.ones(32)), keys, {}, layers=read, loss="softmax_cross_entropy"
        )

    many = jax.jit(jax.vmap(one_batch))
    truth = np.array([estimate.value for estimate in drawn(2000)])
    z = [[(e.value - t) / e.data_error for e, t in zip(drawn(100), truth, strict=True)] for _ in range(200)]
    assert np.all(np.mean(np.abs(z) < 1.98, axis=0) > 0.9)
    assert np.all(np.std(z, axis=0) > 0.8)


@pytest.mark.parametrize("sizes", [[100, 1], [1000, *[10] * 9], [100, 100, 10], [10] * 10])
def test_the_error_over_batches_of_unequal_size_is_that_of_their_mean(sizes):
    """On average over batches whose κ is a mean over their samples, of spread 1."""
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(2000):
        tally = Tally()
        for size in sizes:
            of_batch = np.full((2, 1), 1 + rng.normal() / size**0.5)
            tally.add(float(size), Draws(of_batch, of_batch, of_batch))
        squares.append(float(tally.estimates()[0].data_error) ** 2)
    np.testing.assert_allclose(np.mean(squares), 1 / sum(sizes), rtol=0.15)


def test_the_gradient_of_the_penalty_is_that_of_the_dense_value_on_average(monkeypatch):
    """In a random direction, by finite differences of the dense κ^GN, which depends on all parameters."""
    network, layers = NETWORKS["tanh, weighted"](), ("layer0/kernel", "layer2/kernel")
    rng = np.random.default_rng(6)
    change = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), network.params)

    def dense(step):
        params = jax.tree.map(lambda p, c: p + step * c, network.params, change)
        moved = network._replace(params=params)
        return sum(dense_kappas(moved, layer, with_label("softmax_cross_entropy"))[0, 0] for layer in layers)

    monkeypatch.setattr(cotangents, "random_signs", unit)
    read = [Layer(layer, (0,)) for layer in layers]

    def total(params):
        pulled = draws.Pulled(network.outputs_fn, params, network.batch, read, "softmax_cross_entropy")

        def sizes(index):
            gradients = pulled.gradients(numbered(jnp.asarray(index)))
            return sum(pulled.sizes(layer, gradients[layer.path]).value[0] for layer in read)

        return sum(sizes(index) for index in range(pulled.outputs.size))

    slope = jax.jit(lambda p, c: jax.jvp(total, (p,), (c,))[1])(network.params, change)
    np.testing.assert_allclose(slope, (dense(1e-5) - dense(-1e-5)) / 2e-5, rtol=1e-6)


def test_the_penalty_is_a_draw_of_the_profile_and_its_gradient_reaches_every_parameter():
    network = NETWORKS["stack"]()
    value = functools.partial(gauss_newton_flatness, network.outputs_fn)
    estimates = jax.lax.map(
        lambda key: value(network.params, *network.batch, key=key), jax.random.split(jax.random.key(0), 3000)
    )
    want = sum(dense_kappas(network, layer, with_label("softmax_cross_entropy"))[0].sum() for layer in network.layers)
    assert abs(estimates.mean() - want) < 4 * estimates.std() / 3000**0.5 < 0.2 * want
    gradient = jax.grad(lambda params: value(params, *network.batch, key=jax.random.key(0)))(network.params)
    assert all(jnp.any(leaf != 0) and jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def tiled(network, tile_size):
    """The head of a perceptron in tiles of its outputs."""

    def outputs_fn(params, x, weights):
        rest = {name: params[name] for name in ("layer0", "layer1")}
        identity = {"kernel": jnp.eye(4, dtype=x.dtype), "bias": jnp.zeros(4, x.dtype)}
        feats = network.outputs_fn({**rest, "layer2": identity}, x, weights)[0]
        return TiledLogits(feats, params["layer2"], tile_size), weights

    return network._replace(outputs_fn=outputs_fn)


@pytest.mark.parametrize("tile_size", [1, 2, 3, 7])
@pytest.mark.parametrize("certainty", [0.0, 1.0, 30.0])
def test_logits_in_tiles_have_the_cotangents_of_all_at_once(tile_size, certainty, monkeypatch):
    rng = np.random.default_rng(7)
    feats, weights = jnp.asarray(rng.normal(size=(6, 4))), jnp.asarray(rng.uniform(size=6))
    head = {
        "kernel": jnp.asarray(certainty * rng.normal(size=(4, 7))),
        "bias": jnp.asarray(min(certainty, 1) * rng.normal(size=7)),
    }
    signs = jnp.asarray(rng.choice([-1.0, 1.0], (6, 7)))

    def of_tile(key, shape, dtype):
        start = jnp.minimum(jax.random.key_data(key)[1].astype(int) * shape[1], 7 - shape[1])
        return jax.lax.dynamic_slice_in_dim(signs, start, shape[1], 1)

    monkeypatch.setattr(tiled_logits, "random_signs", of_tile)
    monkeypatch.setattr(
        tiled_logits.jax.random,
        "fold_in",
        lambda key, i: numbered(i),
    )

    def at_once(feats, head):
        logits = feats @ head["kernel"] + head["bias"][None]
        u = cotangents.NAMED["softmax_cross_entropy"](logits, signs) * jnp.sqrt(weights)[:, None]
        return {"feats": u @ head["kernel"].T, "kernel": feats.T @ u, "bias": u.sum(axis=0)}

    def in_tiles(feats, head):
        got = tiled_logits.cotangent_of(TiledLogits(feats, head, tile_size), weights, jax.random.key(0))
        return {"feats": got.feats, **got.head}

    want, got = jax.jit(at_once)(feats, head), jax.jit(in_tiles)(feats, head)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12 * scale), want, got)
    # Their derivatives too: the penalty is trained with.
    change = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), (feats, head))
    want, got = (jax.jit(lambda x, c, f=f: jax.jvp(f, x, c)[1])((feats, head), change) for f in (at_once, in_tiles))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda w, g: np.testing.assert_allclose(g, w, rtol=1e-7, atol=1e-10 * scale), want, got)


def test_logits_in_tiles_give_the_same_profile():
    network = perceptron(jnp.tanh, weighted=True)
    options = {"key": jax.random.key(0), "num_draws": 500, "max_draws": 500}
    got = gauss_newton_profile(tiled(network, 2).outputs_fn, network.params, [network.batch], **options)
    for layer in network.layers:
        want = dense_kappas(network, layer, with_label("softmax_cross_entropy"))[0, 0]
        assert abs(got[layer].value - want) < 4 * got[layer].standard_error


@pytest.mark.parametrize("margin", [1.0, 12.0, 28.0])
def test_cotangents_keep_their_digits_in_the_collapsed_regime(margin):
    """Up to a loss of 1e-12, in float32, with equal logits too."""
    rng = np.random.default_rng(8)
    logits = rng.normal(size=(5, 4))
    logits[np.arange(5), [0, 3, 1, 2, 0]] += margin
    logits[4] = 0
    signs = rng.choice([-1.0, 1.0], (5, 4))
    logits = logits.astype(np.float32)
    p = np.exp(np.float64(logits) - np.log(np.exp(np.float64(logits)).sum(axis=1, keepdims=True)))
    k = p.argmax(axis=1)
    others = np.where(np.arange(4) == k[:, None], 0, p).sum(axis=1)
    total = np.where(np.arange(4) == k[:, None], 0, np.sqrt(p) * signs).sum(axis=1)
    at_k = np.arange(4) == k[:, None]
    want = np.where(
        at_k,
        (others * np.sqrt(p[np.arange(5), k]) * signs[np.arange(5), k] - (1 - others) * total)[:, None],
        np.sqrt(p) * signs - p * (np.sqrt(p) * signs).sum(axis=1, keepdims=True),
    )
    got = cotangents.NAMED["softmax_cross_entropy"](jnp.asarray(logits), jnp.asarray(signs, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-6 * np.abs(want).max(axis=1, keepdims=True).min())


@pytest.mark.parametrize("power", [-70, 70])
def test_no_square_overflows(power):
    """With weights · 2^±70 and features the other way, float32 gives what float64 does."""

    def outputs_fn(params, x):
        return x @ params["head"]["kernel"]

    rng = np.random.default_rng(9)
    x, W = rng.normal(size=(6, 3)) * 2.0**power, rng.normal(size=(3, 4)) * 2.0**-power
    values = [
        gauss_newton_profile(
            outputs_fn, {"head": {"kernel": jnp.asarray(W, dtype)}}, [(jnp.asarray(x, dtype),)], key=jax.random.key(0),
            num_draws=2,
        )["head/kernel"].value
        for dtype in (jnp.float32, jnp.float64)
    ]  # fmt: skip
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


def test_parameters_in_bfloat16_are_measured_in_float32():
    network = NETWORKS["relu"]()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (network.params, network.batch))
    profile = gauss_newton_profile(
        network.outputs_fn, half[0], [half[1]], key=jax.random.key(0), num_draws=400, max_draws=400
    )
    for layer in network.layers:
        want = dense_kappas(network, layer, with_label("softmax_cross_entropy"))[0, 0]
        assert abs(profile[layer].value - want) < 4 * profile[layer].standard_error + 0.03 * want


@pytest.mark.parametrize("make", [lambda x, head: x @ head["kernel"], TiledLogits])
def test_padding_may_hold_numbers_whose_logits_are_infinite(make):
    head = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}
    x, labels = jnp.ones((5, 3), jnp.float32).at[1].set(3e38), jnp.array([0, -100, 1, 2, 3])
    of_all, of_others = (
        gauss_newton_profile(lambda p, x, y: make(x, p), head, [batch], key=jax.random.key(0), num_draws=64)["kernel"]
        for batch in ((x, labels), (x[2:], labels[2:]))
    )
    assert np.isfinite(of_all.value)
    assert abs(of_all.value - of_others.value) < 5 * (of_all.standard_error + of_others.standard_error)


def test_minus_100_is_a_target_where_labels_are_no_classes():
    y = jnp.array([-100, 50, 30, 10])
    values = [
        gauss_newton_profile(
            lambda p, x, y: x @ p["kernel"], {"kernel": jnp.ones((3, 1))}, [(jnp.ones((4, 3)), targets)],
            key=jax.random.key(0), loss="squared_error",
        )["kernel"].value
        for targets in (y, y.astype(float))
    ]  # fmt: skip
    assert values[0] == values[1]


def test_half_precision_does_not_lose_what_is_small():
    """At a loss of 1e-12 cotangents of float16 would be 0."""
    values = [
        gauss_newton_profile(
            lambda p, x: x @ p["kernel"], {"kernel": 30 * jnp.eye(4, dtype=dtype)}, [(jnp.eye(4, dtype=dtype),)],
            key=jax.random.key(0), num_draws=16,
        )["kernel"].value
        for dtype in (jnp.float32, jnp.float16, jnp.bfloat16)
    ]  # fmt: skip
    assert values[0] > 0
    np.testing.assert_allclose(values[1:], values[0], rtol=0.05)


def test_labels_of_minus_100_in_a_batch_count_nowhere():
    def outputs_fn(params, x, labels):
        return x @ params["kernel"]

    rng = np.random.default_rng(10)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4)))}
    x, labels = jnp.asarray(rng.normal(size=(4, 3))), jnp.array([0, -100, 3, 1])
    options = {"key": jax.random.key(0), "num_draws": 2000, "max_draws": 2000}
    got = gauss_newton_profile(outputs_fn, params, [(x, labels)], **options)["kernel"]
    kept = np.array([0, 2, 3])
    want = float(flatjax.relative_flatness(params, x[kept], labels[kept]))
    assert abs(got.value - want) < 4 * got.standard_error < 0.3 * want
    with raises(ValueError, "no sample of any batch counts"):
        gauss_newton_profile(outputs_fn, params, [(x, jnp.full(4, -100))], key=jax.random.key(0))


def test_draws_go_on_until_the_relative_error_is_reached():
    network = NETWORKS["relu"]()
    options = {"key": jax.random.key(0), "num_draws": 8, "max_draws": 4000}
    profile = gauss_newton_profile(network.outputs_fn, network.params, [network.batch], relative_error=0.05, **options)
    for estimate in profile.values():
        assert estimate.num_draws > 8
        assert estimate.standard_error < 0.08 * estimate.value


def test_what_is_known_is_reported_after_each_batch_and_prints_as_a_table():
    network, seen = NETWORKS["stack"](), []
    profile = gauss_newton_profile(
        network.outputs_fn, network.params, [network.batch] * 3, key=jax.random.key(0), report=seen.append
    )
    assert [int(each["head/kernel"].num_draws) for each in seen] == [2, 4, 6]
    assert np.isnan(seen[0]["head/kernel"].data_error)
    assert np.isfinite(seen[1]["head/kernel"].data_error)
    assert list(profile) == ["blocks/kernel[0]", "blocks/kernel[1]", "head/kernel"]
    assert profile["blocks/kernel"].value.shape == (2,)
    assert "blocks/kernel[1]" in str(profile)
    assert profile.to_rows()[0]["layer"] == "blocks/kernel[0]"


@pytest.mark.parametrize("split", ["data", "kernels"])
def test_eight_devices_give_what_one_gives(split):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(11)
    params = {"hidden": {"kernel": rng.normal(size=(6, 16))}, "head": {"kernel": rng.normal(size=(16, 8))}}
    x = rng.normal(size=(24, 6))

    def outputs_fn(params, x):
        return jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]

    of_data = PartitionSpec("x") if split == "data" else PartitionSpec()
    of_kernels = PartitionSpec(None, "x") if split == "kernels" else PartitionSpec()
    placed = jax.device_put(params, NamedSharding(mesh, of_kernels)), jax.device_put(x, NamedSharding(mesh, of_data))
    one = gauss_newton_profile(
        outputs_fn, jax.tree.map(jnp.asarray, params), [(jnp.asarray(x),)], key=jax.random.key(0)
    )
    eight = gauss_newton_profile(outputs_fn, placed[0], [(placed[1],)], key=jax.random.key(0))
    for path in one:
        np.testing.assert_allclose(eight[path].value, one[path].value, rtol=1e-10)
    value = functools.partial(gauss_newton_flatness, outputs_fn, key=jax.random.key(0))
    on_one, on_eight = (jax.grad(value)(p, b) for p, b in ((jax.tree.map(jnp.asarray, params), jnp.asarray(x)), placed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), on_eight, on_one)


def test_axes_that_do_not_split_the_samples_are_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params, x, split = {"kernel": jnp.ones((3, 4))}, jnp.ones((16, 3)), PartitionSpec("x")

    def value(params, x, axis_name):
        return gauss_newton_flatness(
            lambda p, x: x @ p["kernel"], params, x, key=jax.random.key(0), axis_name=axis_name
        )

    for axis_name, options in ((None, {}), ("x", {"check_vma": False})):
        mapped = jax.shard_map(
            functools.partial(value, axis_name=axis_name), mesh=mesh, in_specs=(PartitionSpec(), split),
            out_specs=PartitionSpec(), **options,
        )  # fmt: skip
        with raises(ValueError, "name the axes that split the samples"):
            mapped(params, x)
    with raises(ValueError, "outside, leave axis_name out"):
        jax.vmap(functools.partial(value, axis_name="b"), (None, 0), axis_name="b")(params, x[:, None])


@pytest.mark.parametrize("is_tiled", [False, True])
def test_inside_a_shard_map_the_draws_of_devices_are_independent(is_tiled):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    network = NETWORKS["tanh, weighted"]()
    outputs_fn = tiled(network, 2).outputs_fn if is_tiled else network.outputs_fn
    rng = np.random.default_rng(12)
    x, weights = jnp.asarray(rng.normal(size=(16, 3))), jnp.ones(16)
    split = PartitionSpec("x")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), split, split, PartitionSpec()), out_specs=PartitionSpec()
    )
    def value(params, x, weights, key):
        return gauss_newton_flatness(outputs_fn, params, x, weights, key=key, axis_name="x")

    values = np.array([value(network.params, x, weights, jax.random.key(seed)) for seed in range(400)])
    whole = network._replace(batch=(x, weights))
    want = sum(dense_kappas(whole, layer, with_label("softmax_cross_entropy"))[0, 0] for layer in network.layers)
    assert abs(values.mean() - want) < 4 * values.std() / 20 < 0.3 * want


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_profile_and_penalty_are_exported(platform):
    network = NETWORKS["stack"]()

    def penalty(params, x, key):
        return jax.value_and_grad(lambda p: gauss_newton_flatness(network.outputs_fn, p, x, key=key))(params)

    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (network.params, network.batch[0]))
    exported = jax.export.export(jax.jit(penalty), platforms=[platform])(*single, jax.random.key(0))
    assert exported.platforms == (platform,)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"loss": "hinge"}, "loss is 'hinge', wanted one of 'softmax_cross_entropy'"),
        ({"num_draws": 1}, "num_draws is 1, wanted at least 2"),
        ({"num_draws": 80}, "max_draws is 64, wanted at least num_draws, 80"),
        ({"relative_error": 0.0}, "relative_error is 0.0"),
        ({"layers": "layer0/kernel"}, "wanted several"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["nowhere"]}, "no leaf at 'nowhere'"),
        ({"layers": ["layer0/kernel", "layer0/kernel"]}, "names a leaf twice"),
        ({"loss": lambda logits, *_: -jnp.sum(logits**2, axis=-1)}, "not convex in the logits"),
        ({"loss": lambda logits, *_: jnp.sum(logits**2)}, "loss returns the shape"),
        ({"batches": []}, "batches is empty"),
    ],
)
def test_bad_options_are_refused(options, wanted):
    network = NETWORKS["relu"]()
    arguments = {"batches": [network.batch], "key": jax.random.key(0)} | options
    with raises(ValueError, wanted):
        gauss_newton_profile(network.outputs_fn, network.params, **arguments)


def test_bad_outputs_are_refused():
    key = jax.random.key(0)
    params = {"kernel": jnp.ones((2, 3))}
    for outputs_fn, error, wanted in (
        (lambda p, x: (x @ p["kernel"], jnp.ones(7)), ValueError, r"weights \(7,\) for logits \(4, 3\), wanted \(4,\)"),
        (lambda p, x: jnp.argmax(x @ p["kernel"], axis=1), TypeError, "dtype int"),
        (lambda p, x: "logits", TypeError, "a str"),
    ):
        with raises(error, wanted):
            gauss_newton_flatness(outputs_fn, params, jnp.ones((4, 2)), key=key)
    with raises(TypeError, "a batch is a Array"):
        gauss_newton_profile(lambda p, x: x @ p["kernel"], params, [jnp.ones((4, 2))], key=key)
    with raises(ValueError, "it is differentiated"):
        gauss_newton_flatness(lambda p, x: x @ p["kernel"], params, jnp.ones((4, 2)), key=key, loss="hinge")


def test_bad_values_are_nan():
    params = {"kernel": jnp.ones((2, 3)).at[0, 0].set(jnp.nan)}
    value = gauss_newton_flatness(lambda p, x: x @ p["kernel"], params, jnp.ones((4, 2)), key=jax.random.key(0))
    assert np.isnan(value)
    network = Network(
        lambda p, x: (x @ p["kernel"], -jnp.ones(4)), {"kernel": jnp.ones((2, 3))}, (jnp.ones((4, 2)),), ()
    )
    assert np.isnan(gauss_newton_flatness(network.outputs_fn, network.params, *network.batch, key=jax.random.key(0)))
