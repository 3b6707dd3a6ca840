"""Relative flatness of hidden and last layers against dense float64 Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax import layer_relative_flatness, relative_flatness
from flatjax.layers.kernels import Layer

from .cases import (
    CASES,
    EVERY_LAYER,
    Case,
    cross_entropy,
    dense_kappa,
    measured,
    normalised,
    perceptron,
    repeated,
)

TOLERANCE = {"perceptron": 1e-10, "convolutional": 1e-10, "attentive": 1e-6}  # attention sums in float32 inside JAX


BY_OUTPUTS = [
    *(("perceptron", f"layer{i}/kernel") for i in range(3)),
    ("convolutional", "head/kernel"),
    *(("attentive", f"attention/{each}/kernel") for each in ("query", "key", "value", "out")),
    ("attentive", "up/kernel"),
]


def flatness(case, layer, **options):
    return layer_relative_flatness(case.loss_fn, case.params, *case.batch, layer=layer, **options)


@pytest.mark.parametrize(("name", "layer"), EVERY_LAYER, ids=str)
def test_exact_kappa_of_a_layer_is_that_of_the_dense_hessian(name, layer):
    methods = ("weights", "outputs") if (name, layer) in BY_OUTPUTS else ("weights",)
    # The last chunk of a perceptron is smaller than the others.
    dense, *estimates = measured(CASES[name](), layer, *methods, chunk_size=7 if name == "perceptron" else 2)
    for method, estimate in zip(methods, estimates, strict=True):
        np.testing.assert_allclose(estimate.value, dense, rtol=TOLERANCE[name], err_msg=method)
        assert (estimate.standard_error, estimate.num_probes) == (0, 0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("perceptron", "layer1/kernel"), ("convolutional", "conv/kernel"), ("attentive", "attention/value/kernel"),
     ("attentive", Layer("embed/embedding", (1,)))],
    ids=str,
)  # fmt: skip
def test_the_interval_of_95_percent_covers_kappa_in_90_to_99_percent_of_200_repetitions(name, layer):
    kappa, values, errors = repeated(CASES[name](), layer, num_probes=64)
    assert 0.9 <= np.mean(np.abs(values - kappa) <= 2.0 * errors) <= 0.99  # 2.0: the 97.5 % point of t with 63 degrees
    assert abs(np.mean(values) - kappa) < 4 * np.std(values) / 200**0.5


def test_interacting_samples_are_noticed():
    case, layer = normalised(), "layer0/kernel"
    dense, by_outputs, exact = measured(case, layer, "outputs", "auto", num_probes=99)
    assert np.isnan(by_outputs.value)
    np.testing.assert_allclose(exact.value, dense, rtol=1e-10)
    probed = flatness(case, layer, key=jax.random.key(0), num_probes=8)
    assert probed.num_probes == 8
    assert probed.standard_error > 0
    dense, of_head = measured(case, "head/kernel", "auto")
    np.testing.assert_allclose(of_head.value, dense, rtol=1e-10)


def test_without_a_key_what_turns_out_inexact_is_nan():
    case = normalised()
    assert np.isnan(flatness(case, "layer0/kernel", num_probes=5).value)


def test_a_head_of_many_outputs_is_exact_and_the_metric_of_heads():
    case = perceptron(sizes=(3, 4, 50))
    params = {"layer0": case.params["layer0"], "layer1": case.params["layer1"]}
    feats = jnp.tanh(case.batch[0] @ params["layer0"]["kernel"] + params["layer0"]["bias"][None, :])
    estimate = flatness(case, "layer1/kernel", num_probes=2)
    np.testing.assert_allclose(estimate.value, relative_flatness(params["layer1"], feats, case.batch[1]), rtol=1e-10)


def rearranged_loss(params, x, y):
    weight = jnp.transpose(params["query"]["kernel"], (1, 2, 0)).reshape(4, 3)
    return cross_entropy(jnp.tanh(jnp.einsum("km,nm->kn", weight, x)).T, y)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, lambda f: jax.jit(jax.checkpoint(f))])
def test_a_kernel_is_found_through_calls_and_rearrangements(wrap):
    rng = np.random.default_rng(0)
    params = {"query": {"kernel": jnp.asarray(rng.normal(size=(3, 2, 2)))}}
    case = Case(rearranged_loss, params, (jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray([0, 1, 2, 3, 0])))
    estimate = flatness(case._replace(loss_fn=wrap(rearranged_loss)), "query/kernel", method="outputs")
    np.testing.assert_allclose(estimate.value, dense_kappa(case, "query/kernel"), rtol=1e-10)


def test_a_kernel_that_enters_twice_or_in_a_loop_is_not_taken_for_one_product():
    def twice(params, x, y):
        return cross_entropy(jnp.tanh(x @ params["kernel"]) @ params["kernel"], y)

    def scanned(params, x, y):
        return cross_entropy(jax.lax.scan(lambda x, _: (x @ params["kernel"], None), x, None, length=2)[0], y)

    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 3)))}
    for loss_fn in (twice, scanned):
        case = Case(loss_fn, params, (jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray([0, 1, 2, 1, 0])))
        with pytest.raises(ValueError, match="'kernel' is used"):
            flatness(case, "kernel", method="outputs")
        dense, estimate = measured(case, "kernel", "auto")
        np.testing.assert_allclose(estimate.value, dense, rtol=1e-10)


def test_leaves_of_one_path_are_refused():
    case = perceptron()
    params = case.params | {"layer0/kernel": jnp.ones((3, 5))}
    with pytest.raises(ValueError, match="two leaves at 'layer0/kernel'"):
        flatness(case._replace(params=params), "layer1/kernel")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kappa_of_low_precision_is_summed_in_float32(dtype):
    case = perceptron().astype(dtype)
    kappa = dense_kappa(case.astype(jnp.float64), "layer1/kernel")
    for estimate in measured(case, "layer1/kernel", "weights", "outputs")[1:]:
        assert estimate.value.dtype == jnp.float32
        np.testing.assert_allclose(estimate.value, kappa, rtol=1e-5 if dtype == jnp.float32 else 0.1)


@functools.cache
def by_methods(loss_fn, layer, methods):
    """By each method, from one program."""

    @jax.jit
    def kappas(params, *batch):
        given, key = Case(loss_fn, params, batch), jax.random.key(0)
        return {method: flatness(given, layer, method=method, key=key).value for method in methods}

    return kappas


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("methods", "sizes"), [(("probes", "outputs", "weights"), (4, 8, 6, 3)), (("outputs",), (9, 4, 6, 3))]
)
def test_kappa_of_sharded_parameters_and_batches_is_that_of_one_device(axis_type, methods, sizes):
    case = perceptron(num_samples=16, sizes=sizes)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    params = jax.device_put(case.params, NamedSharding(mesh, PartitionSpec()))
    split = jax.device_put(case.params["layer0"]["kernel"], NamedSharding(mesh, PartitionSpec(None, "model")))
    params["layer0"]["kernel"] = split
    params["layer0"]["bias"] = jax.device_put(params["layer0"]["bias"], NamedSharding(mesh, PartitionSpec("model")))
    batch = jax.device_put(case.batch, NamedSharding(mesh, PartitionSpec("data")))
    measure = by_methods(case.loss_fn, "layer0/kernel", methods)
    with jax.set_mesh(mesh):
        kappas = measure(params, *batch)
    for method, want in measure(case.params, *case.batch).items():
        np.testing.assert_allclose(kappas[method], want, rtol=1e-10, err_msg=method)


def test_kappa_of_a_layer_is_exported_for_accelerators_by_every_method():
    case = perceptron().astype(jnp.float32)
    measure = by_methods(case.loss_fn, "layer1/kernel", ("probes", "outputs", "weights", "auto"))
    exported = jax.export.export(measure, platforms=("cpu", "cuda", "tpu"))(case.params, *case.batch)
    here = exported.call(case.params, *case.batch)
    for method, want in measure(case.params, *case.batch).items():
        np.testing.assert_allclose(here[method], want, rtol=1e-5, err_msg=method)


def test_memory_is_flat_in_the_number_of_probes():
    case = perceptron(num_samples=64, sizes=(64, 64, 8))

    def memory(num_probes):
        measure = functools.partial(
            layer_relative_flatness, case.loss_fn, layer="layer0/kernel", num_probes=num_probes, method="probes"
        )
        lowered = jax.jit(lambda params, key, *batch: measure(params, *batch, key=key)).lower(
            case.params, jax.random.key(0), *case.batch
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(256) < memory(4) + 256 * 64  # but for the probes' keys and values


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": "layer9/kernel"}, ValueError, "no leaf at 'layer9/kernel'; its layers are 'layer0/kernel'"),
        ({"layer": "layer0/bias"}, ValueError, "is no layer"),
        ({"layer": Layer("layer0/kernel", (2,))}, ValueError, "feature_axes is"),
        ({"layer": "layer0/kernel", "method": "best"}, ValueError, "method is 'best'"),
        ({"layer": "layer0/kernel", "method": "probes"}, ValueError, "key is None"),
        ({"layer": "layer0/kernel", "key": 0, "method": "probes"}, TypeError, r"key is 0, wanted one key: jax\.random"),
        ({"layer": "layer0/kernel", "num_probes": 2}, ValueError, r"probes: give .*num_probes=3 or method='outputs'"),
        ({"layer": "layer0/kernel", "num_probes": 1}, ValueError, "num_probes is 1, wanted at least 2"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with raises(error, message):
        flatness(perceptron(), **options)


def test_parameters_that_are_not_finite_give_nan():
    case = perceptron()
    case.params["layer0"]["kernel"] = case.params["layer0"]["kernel"].at[0, 0].set(jnp.nan)
    methods = ("weights", "outputs", "probes")
    for value in by_methods(case.loss_fn, "layer1/kernel", methods)(case.params, *case.batch).values():
        assert np.isnan(value)
