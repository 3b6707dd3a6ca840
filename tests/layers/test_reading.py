"""Kernels are read as the program uses them: each way of using one against dense float64 Hessians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax import flatness_profile, layer_relative_flatness
from flatjax.layers.kernels import Layer
from flatjax.layers.reading.feature_axes import MisreadKernelError, read_layer
from flatjax.layers.reading.program import Program

from .cases import Case, cross_entropy, dense_kappa, measured, repeated
from .uses import PATH, USES, linen_stack, nnx_stack, of


def flatness(case, layer, **options):
    return layer_relative_flatness(case.loss_fn, case.params, *case.batch, layer=layer, **options)


def assert_by_weights(case, layer, *, given=None, **tolerance):
    want, estimate = measured(case, layer, "weights", given=given)
    np.testing.assert_allclose(estimate.value, want, **tolerance)


def reading(case, layer=PATH):
    return read_layer(Program.of(case.loss_fn, case.params, case.batch), layer)


@pytest.mark.parametrize("name", USES)
def test_a_kernel_is_read_as_it_is_used(name):
    case, layer, has_outputs = USES[name].case(), USES[name].layer, USES[name].has_outputs
    program = Program.of(case.loss_fn, case.params, case.batch)
    assert read_layer(program, PATH) == layer
    assert read_layer(program, layer) == layer
    want, *estimates = measured(case, layer, *(("weights", "outputs") if has_outputs else ("weights",)), given=PATH)
    for estimate in estimates:
        np.testing.assert_allclose(estimate.value, want, rtol=1e-10, atol=1e-14)
        assert estimate.value.shape == estimate.standard_error.shape == layer.stack_shape(USES[name].shape)
    if not has_outputs:
        with pytest.raises(ValueError, match=f"'{PATH}' "):
            flatness(case, PATH, method="outputs")


@pytest.mark.parametrize("name", [name for name in USES if name != "low rank, in, merged"])  # as which it may be read
@pytest.mark.parametrize("method", ["weights", "outputs", "probes", "auto"])
def test_a_kernel_that_is_said_to_be_another_is_refused_on_every_route(name, method):
    used = USES[name]
    if sum(size > 1 for size in used.shape) < 2:
        pytest.skip("a kernel of one axis of several entries is the same however it is read")
    long = [axis for axis, size in enumerate(used.shape) if size > 1]
    wrong = next(axis for axis in long if axis not in used.feature_axes)
    with pytest.raises(ValueError, match=rf"give .*Layer\('{PATH}', feature_axes="):
        flatness(used.case(), Layer(PATH, (wrong,)), method=method, key=jax.random.key(0))


@pytest.mark.parametrize("name", ["scanned", "scanned twice", "routed"])
def test_the_intervals_of_the_probes_of_a_stack_cover_kappa_of_each_layer(name):
    want, values, errors = repeated(USES[name].case(), USES[name].layer, num_probes=32)
    covered = np.mean(np.abs(values - want[None]) <= 2.04 * errors, axis=0)  # the 97.5 % point of t with 31 degrees
    assert np.all((covered >= 0.89) & (covered <= 0.995))
    assert np.all(np.abs(np.mean(values, axis=0) - want) < 4 * np.std(values, axis=0) / 200**0.5)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_of_linen_is_found(axis):
    loss, params = linen_stack(axis)
    check_stack_is_found(loss, params, Layer("up/kernel", (1 - axis,), (axis,)))


def test_a_stack_of_nnx_is_found():
    loss, params = nnx_stack()
    check_stack_is_found(loss, params, Layer("up/kernel", (1,), (0,)))


def check_stack_is_found(loss, params, layer):
    rng = np.random.default_rng(0)
    case = Case(loss, params, (jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.integers(0, 3, 5))))
    want, by_outputs = measured(case, layer, "outputs", given="up/kernel")
    np.testing.assert_allclose(by_outputs.value, want, rtol=1e-10)
    profile = flatness_profile(loss, params, [case.batch], key=jax.random.key(0), num_probes=16)
    assert list(profile) == ["up/kernel[0]", "up/kernel[1]"]
    np.testing.assert_allclose([estimate.value for estimate in profile.values()], want, rtol=1e-10)
    np.testing.assert_allclose(profile["up/kernel"].value, want, rtol=1e-10)


@pytest.mark.parametrize("route", ["layerwise", "joint"])
def test_a_profile_of_a_stack_is_kappa_of_each_layer_within_its_standard_error(route):
    rng = np.random.default_rng(1)
    params = {"blocks": {"kernel": jnp.asarray(rng.normal(size=(3, 12, 12)) / 6)}, "head": {"kernel": jnp.eye(12)}}
    batches = [(jnp.asarray(rng.normal(size=(n, 12))), jnp.asarray(rng.integers(0, 12, n))) for n in (4, 6)]

    def loss(params, x, y):
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["blocks"]["kernel"])
        return cross_entropy(x @ params["head"]["kernel"], y)

    profile = flatness_profile(
        loss, params, batches, key=jax.random.key(0), num_probes=8, max_probes=8, route=route,
        layers=["blocks/kernel", "head/kernel"],
    )  # fmt: skip
    layer = Layer("blocks/kernel", (1,), (0,))
    want = np.average([dense_kappa(Case(loss, params, batch), layer) for batch in batches], axis=0, weights=[4, 6])
    assert list(profile) == ["blocks/kernel[0]", "blocks/kernel[1]", "blocks/kernel[2]", "head/kernel"]
    for (value, error, num_probes), kappa in zip(list(profile.values())[:3], want, strict=True):
        assert num_probes == 16
        assert 0 < abs(value - kappa) < 4 * error


def test_networks_of_one_input_have_to_be_told_from_one_layer():
    case = Case(of(lambda W, x, _: jax.vmap(lambda w: jnp.tanh(x @ w))(W).mean(axis=0)), *USES["ensemble"].case()[1:])
    with pytest.raises(ValueError, match=r"2 ways: .*feature_axes=\(1,\)\), .*feature_axes=\(1,\), stack_axes=\(0,\)"):
        flatness(case, PATH)
    for layer in (Layer(PATH, (1,)), Layer(PATH, (1,), (0,))):
        want, *estimates = measured(case, layer, "weights", "outputs")
        for estimate in estimates:
            np.testing.assert_allclose(estimate.value, want, rtol=1e-10)


def test_a_kernel_used_both_ways_round_has_to_be_told():
    case = USES["out, in"].case()._replace(loss_fn=of(lambda W, x, _: jnp.tanh(x @ W) @ W.T))
    with pytest.raises(ValueError, match=r"2 ways: .*feature_axes=\(0,\)\), .*feature_axes=\(1,\)\)"):
        flatness(case, PATH)
    for axis in (0, 1):
        assert_by_weights(case, Layer(PATH, (axis,)), rtol=1e-10)


@pytest.mark.parametrize(
    "network",
    [
        lambda W, x, _: x @ jax.scipy.linalg.expm(W),
        lambda W, x, _: x + W[None, 0] * jnp.sort(W, axis=0)[None, 1],
        lambda W, x, _: jnp.tanh(x + W[:1] * x),
        lambda W, x, _: jnp.tanh(x) @ jnp.cumsum(W, axis=1),
    ],
)  # fmt: skip
def test_a_kernel_whose_axes_cannot_be_followed_is_refused_and_taken_as_it_is_said(network):
    case = USES["masked"].case()._replace(loss_fn=of(network))
    with pytest.raises(ValueError, match=rf"{PATH}.*Layer\('{PATH}', feature_axes=\(0,\)\)"):
        flatness(case, PATH, method="weights")
    assert_by_weights(case, Layer(PATH, (0,)), rtol=1e-10, atol=1e-12)


def test_a_penalty_on_a_kernel_says_nothing_of_its_axes():
    def loss(params, x, y):
        W = params["body"]["kernel"]
        penalty = jnp.sum(W**2) + jnp.sum((W.T @ W - jnp.eye(3)) ** 2) + jnp.linalg.norm(W) + jnp.max(W)
        return USES["out, in"].loss_fn(params, x, y) + 0.1 * penalty

    case, layer = USES["out, in"].case()._replace(loss_fn=loss), USES["out, in"].layer
    assert reading(case) == layer
    assert_by_weights(case, layer, given=PATH, rtol=1e-10)


def test_rows_that_are_looked_up_before_a_loop_over_blocks_are_read():
    """The loop changes them, and they are no longer rows of the table once they come out of it."""
    rng = np.random.default_rng(0)
    params = {"embedding": rng.normal(size=(5, 3)), "blocks": {"kernel": rng.normal(size=(2, 3, 3)) / 2}}

    def loss(params, tokens, y):
        x = params["embedding"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, params["blocks"]["kernel"])
        return cross_entropy(x, y)

    case = Case(loss, jax.tree.map(jnp.asarray, params), (jnp.array([0, 3, 3, 1]), jnp.array([0, 2, 1, 1])))
    assert_by_weights(case, Layer("embedding", (0,)), given="embedding", rtol=1e-9)


COLUMNS = np.array([1, 0, 3, 2])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_columns_in_another_order_are_those_of_the_same_layer(scale):
    def loss(params, x, y):
        logits = jnp.tanh(x @ params["body"]["kernel"]) @ (params["head"]["kernel"][:, COLUMNS] * scale)
        return cross_entropy(logits, jnp.asarray(np.argsort(COLUMNS))[y])

    case = USES["masked"].case()._replace(loss_fn=loss)
    assert reading(case, "head/kernel") == Layer("head/kernel", (0,))
    assert_by_weights(case, Layer("head/kernel", (0,)), given="head/kernel", rtol=1e-10)


def test_columns_that_data_chooses_are_those_of_a_head_by_its_name():
    def loss(params, x, classes, y):
        columns = params["head"]["kernel"][:, classes]
        return cross_entropy(jnp.einsum("nm,mnt->nt", x, columns), y)

    used = USES["masked"].case()
    batch = used.batch[0], jnp.tile(jnp.arange(4), (len(used.batch[0]), 1)), used.batch[1]
    case = Case(loss, used.params, batch)
    assert_by_weights(case, Layer("head/kernel", (0,)), given="head/kernel", rtol=1e-10)
    params = used.params | {"table": used.params["head"]["kernel"]}
    of_table = Case(lambda p, *b: loss({"head": {"kernel": p["table"]}}, *b), params, batch)
    with pytest.raises(ValueError, match=r"feature_axes"):
        flatness(of_table, "table", method="weights")


def routed(change):
    """Each sample is multiplied with a matrix that it chooses, after a change of it."""

    def loss(params, x, chosen, y):
        feats = jnp.einsum("nm,nmd->nd", x, change(params["body"]["kernel"][chosen], params))
        return cross_entropy(jnp.tanh(feats) @ params["head"]["kernel"], y)

    used = USES["experts"].case()
    return Case(loss, used.params, (used.batch[0], jnp.array([0, 1, 1, 0, 1]), used.batch[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda W, _: W,
        lambda W, _: W * 0.9,
        lambda W, _: W * jnp.ones((1, 1, 3)),
        lambda W, params: W * params["scale"][None, None, :],
        lambda W, _: -W / 3,
    ],
)
def test_a_matrix_that_data_chooses_is_one_of_a_stack_also_when_it_is_scaled(change):
    case = routed(change)
    assert reading(case) == Layer(PATH, (1,), (0,))
    assert_by_weights(case, Layer(PATH, (1,), (0,)), given=PATH, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [lambda W, params: W + params["other"]["kernel"][None], lambda W, params: W @ params["other"]["kernel"]],
)
def test_a_matrix_that_data_chooses_and_that_cannot_be_followed_is_refused(change):
    with pytest.raises(MisreadKernelError, match="cannot be seen along which of its axes the features run"):
        flatness(routed(change), PATH, method="weights")


def test_rows_that_are_looked_up_are_those_of_one_hot_features():
    def loss(params, tokens, y):
        return cross_entropy(jnp.tanh(params["body"]["kernel"][tokens] * 2) @ params["head"]["kernel"], y)

    case = USES["masked"].case()
    case = Case(loss, case.params, (jnp.asarray([0, 2, 1, 1, 0]), case.batch[1]))
    assert reading(case) == Layer(PATH, (0,))
    with pytest.raises(ValueError, match=r"feature_axes=\(0,\)"):
        flatness(case, Layer(PATH, (1,)), method="weights")


def test_a_kernel_that_cannot_be_read_does_not_keep_the_others_from_being_measured():
    case = (
        USES["masked"].case()._replace(loss_fn=of(lambda W, x, p: (x @ p["other"]["kernel"]) @ jnp.cumsum(W, axis=1)))
    )
    profile = flatness_profile(case.loss_fn, case.params, [case.batch], key=jax.random.key(0), num_probes=16)
    assert list(profile) == ["body/kernel", "head/kernel", "other/kernel"]
    assert np.isnan(profile["body/kernel"].value)
    assert "cumsum" in profile.unread["body/kernel"]
    assert list(profile.unread) == ["body/kernel"]
    np.testing.assert_allclose(profile["head/kernel"].value, dense_kappa(case, Layer("head/kernel", (0,))), rtol=1e-10)
    with pytest.raises(ValueError, match="no kernel of params can be read"):
        flatness_profile(case.loss_fn, case.params, [case.batch], key=jax.random.key(0), layers=["body/kernel"])


def test_kernels_of_unusual_names_are_listed_as_they_are_to_be_given():
    def loss(params, x, y):
        return cross_entropy(jnp.tanh(x @ params["first"]) @ params["out"].T, y)

    params = {"first": jnp.eye(3), "out": jnp.ones((4, 3)), "scale": jnp.ones(3), "table": jnp.ones((2, 2))}
    batch = USES["masked"].case().batch
    given = r"layers=\[Layer\('first', feature_axes=\(0,\)\), Layer\('out', feature_axes=\(1,\)\)\]"
    with pytest.raises(ValueError, match=given):
        flatness_profile(loss, params, [batch], key=jax.random.key(0))


def test_a_loss_with_further_results_is_named():
    case = USES["masked"].case()
    with pytest.raises(TypeError, match=r"lambda \*args: loss_fn\(\*args\)\[0\]"):
        flatness(case._replace(loss_fn=lambda *arguments: (case.loss_fn(*arguments), 1)), PATH)


METHODS = ("probes", "outputs", "weights")


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def by_methods(loss_fn, params, batch, layer):
    """By each method, from one program."""
    given, key = Case(loss_fn, params, batch), jax.random.key(0)
    return {method: flatness(given, layer, method=method, key=key).value for method in METHODS}


@pytest.mark.parametrize(
    ("axis_type", "split"),
    [
        (AxisType.Auto, PartitionSpec("model")),
        (AxisType.Auto, PartitionSpec(None, None, "model")),
        (AxisType.Explicit, PartitionSpec(None, None, "model")),  # of others JAX has no scan
    ],
    ids=str,
)
def test_kappa_of_a_sharded_stack_is_that_of_one_device(axis_type, split):
    rng = np.random.default_rng(0)
    params = {"blocks": {"kernel": jnp.asarray(rng.normal(size=(4, 4, 4)) / 2)}}
    batch = jnp.asarray(rng.normal(size=(8, 4))), jnp.asarray(rng.integers(0, 4, 8))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        got = by_methods(
            of_stack,
            jax.device_put(params, NamedSharding(mesh, split)),
            jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data"))),
            "blocks/kernel",
        )
    for method, want in by_methods(of_stack, params, batch, "blocks/kernel").items():
        np.testing.assert_allclose(got[method], want, rtol=1e-10, err_msg=method)


def of_stack(params, x, y):
    def block(x, kernel):
        whole = (
            jax.sharding.reshard(kernel, PartitionSpec()) if jax.typeof(kernel).sharding.mesh.explicit_axes else kernel
        )
        return x + jnp.tanh(x @ whole), None

    return cross_entropy(jax.lax.scan(block, x, params["blocks"]["kernel"])[0], y)


def test_kappa_of_a_stack_in_float32_is_exported_for_accelerators_by_every_method():
    case = USES["scanned"].case().astype(jnp.float32)
    measure = jax.jit(lambda params, batch: by_methods(case.loss_fn, params, batch, PATH))
    exported = jax.export.export(measure, platforms=("cpu", "cuda", "tpu"))(case.params, case.batch)
    here = exported.call(case.params, case.batch)
    for method, want in measure(case.params, case.batch).items():
        assert here[method].dtype == jnp.float32
        np.testing.assert_allclose(here[method], want, rtol=1e-5, err_msg=method)


def test_data_that_a_loss_has_closed_over_is_data():
    case = USES["out, in"].case()
    x, y = case.batch
    for loss_fn in (lambda params: case.loss_fn(params, x, y), jax.jit(lambda params: case.loss_fn(params, x, y))):
        assert reading(Case(loss_fn, case.params, ())) == USES["out, in"].layer
    assert reading(Case(lambda params, y: case.loss_fn(params, x, y), case.params, (y,))) == USES["out, in"].layer


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (Layer(PATH, 0), TypeError, r"feature_axes is 0 for 'body/kernel', wanted feature_axes=\(0,\)"),
        (Layer(PATH, [0]), TypeError, "wanted feature_axes=a tuple of integers"),
        (Layer(PATH, ()), ValueError, r"feature_axes is \(\)"),
        (Layer(PATH, (0,), (0,)), ValueError, "wanted different axes"),
    ],
)
def test_axes_that_are_none_are_named(layer, error, message):
    with pytest.raises(error, match=message):
        flatness(USES["masked"].case(), layer)


def test_leaves_that_are_no_arrays_are_named():
    case = USES["masked"].case()
    with pytest.raises(TypeError, match=r"'activation' a function.*eqx.partition"):
        flatness(case._replace(params=case.params | {"activation": lambda x: x}), PATH)
