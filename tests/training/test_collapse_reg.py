"""The injected update is λ∇NCC, of the definition of NCC by pairs of classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flatjax import collapse_reg

from .cases import SIZES, added, assert_trees_close, features, network, samples, some_updates

RATE = 0.3


def labelled_features(params, batch):
    x, labels = batch
    return features(params, x), labels


@jax.jit
def dense_ncc(params, batch):
    """Σ over ordered pairs of classes of (V_c + V_c') / (2‖μ_c − μ_c'‖²), written from the formula."""
    x, labels = batch
    feats = features(params, x)
    masks = [(labels == c).astype(feats.dtype) for c in range(SIZES[-1])]
    shares = [mask / jnp.sum(mask) for mask in masks]
    means = [share @ feats for share in shares]
    variances = [share @ jnp.sum((feats - mean[None]) ** 2, axis=1) for share, mean in zip(shares, means, strict=True)]
    pairs = [(a, b) for a in range(len(means)) for b in range(len(means)) if a != b]
    return sum((variances[a] + variances[b]) / (2 * jnp.sum((means[a] - means[b]) ** 2)) for a, b in pairs)


dense_gradient = jax.jit(jax.grad(dense_ncc))


@pytest.mark.parametrize("rate", [RATE, -RATE])
@pytest.mark.parametrize(("metric", "share"), [("ncc", 1), ("cdnv", 1 / 12)])
def test_what_is_added_is_the_gradient_of_collapse_by_definition(rate, metric, share):
    params, batch, updates = network(), samples(), some_updates(network())
    tx = collapse_reg(rate, features=labelled_features, num_classes=4, metric=metric)
    got, state = jax.jit(tx.update)(updates, tx.init(params), params, batch=batch)
    gradient = dense_gradient(params, batch)
    assert np.max(np.abs(gradient["body"]["kernel"])) > 1e-3
    assert_trees_close(got, added(updates, rate * share, gradient), 1e-11)
    np.testing.assert_allclose(optax.tree.get(state, "collapse"), share * dense_ncc(params, batch), rtol=1e-6)


def test_it_is_the_slope_of_ncc_by_finite_differences():
    params, batch = network(), samples()
    tx = collapse_reg(1.0, features=labelled_features, num_classes=4)
    got, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
    direction, step = some_updates(params), 1e-5
    slope = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(direction), strict=True))
    ahead, behind = (dense_ncc(added(params, sign * step, direction), batch) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


def test_a_penalty_of_ones_own():
    params, batch, updates = network(), samples(), some_updates(network())
    tx = collapse_reg(RATE, dense_ncc)
    got, _ = tx.update(updates, tx.init(params), params, batch=batch)
    assert_trees_close(got, added(updates, RATE, dense_gradient(params, batch)), 1e-12)


def test_classes_that_are_missing_or_single_have_no_part():
    params, (x, _) = network(), samples()
    few = jnp.asarray([0, 0, 0, 0, 1, 1, 1, 1, 3, 3, 3, 2], jnp.int32)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = collapse_reg(1.0, features=labelled_features, num_classes=6)
    got, _ = jax.jit(tx.update)(zeros, tx.init(params), params, batch=(x, few))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(got))
    without, _ = jax.jit(tx.update)(zeros, tx.init(params), params, batch=(x[:-1], few[:-1]))
    assert_trees_close(got, without, 1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_training_with_it_moves_collapse_where_it_is_sent(sign):
    params, batch = network(), samples(24)
    tx = optax.chain(collapse_reg(sign * 0.01, features=labelled_features, num_classes=4), optax.sgd(0.1))
    state, zeros, history = tx.init(params), jax.tree.map(jnp.zeros_like, params), []
    update = jax.jit(tx.update)
    for _ in range(20):
        updates, state = update(zeros, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
        history.append(float(optax.tree.get(state, "collapse")))
    assert sign * (history[0] - history[-1]) > 0.01 * history[0]


# Where it is used.


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_shard_map_it_is_the_mean_of_the_collapse_of_each_device(check_vma):
    params, batch, updates = network(), samples(96), some_updates(network())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = collapse_reg(RATE, features=labelled_features, num_classes=4, axis_name="data")

    def step(params, updates, batch):
        updates, state = tx.update(updates, tx.init(params), params, batch=batch)
        return updates, state.collapse

    specs = {"in_specs": (P(), P(), P("data")), "out_specs": (P(), P())}
    got, collapse = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))(params, updates, batch)

    parts = [jax.tree.map(lambda each, i=i: np.asarray(each)[12 * i : 12 * (i + 1)], batch) for i in range(8)]
    gradient = jax.tree.map(lambda *each: sum(each) / 8, *(dense_gradient(params, part) for part in parts))
    assert_trees_close(got, added(updates, RATE, gradient), 1e-11)
    np.testing.assert_allclose(collapse, np.mean([dense_ncc(params, part) for part in parts]), rtol=1e-6)


def test_in_an_nnx_optimizer():
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(5, 7, param_dtype=jnp.float64, rngs=rngs)

    model, batch = Network(nnx.Rngs(0)), samples()
    graphdef, before = nnx.split(model, nnx.Param)
    before = nnx.to_pure_dict(before)

    def model_features(params, batch):
        return jnp.tanh(nnx.merge(graphdef, params).body(batch[0])), batch[1]

    @nnx.jit
    def step(model, optimizer):
        grads = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
        optimizer.update(model, grads, batch=batch)

    tx = optax.chain(collapse_reg(RATE, features=model_features, num_classes=4), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step(model, optimizer)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_trees_close(got, added(before, -0.1 * RATE, dense_gradient(before, batch)), 1e-12)
    np.testing.assert_allclose(optimizer.opt_state[0].collapse[...], dense_ncc(before, batch), rtol=1e-6)


def test_bfloat16_updates_stay_bfloat16_and_are_rounded_once():
    params, batch = network(dtype=np.float32), samples(dtype=np.float32)
    updates = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), some_updates(params))
    tx = collapse_reg(RATE, features=labelled_features, num_classes=4)
    got, state = jax.jit(tx.update)(updates, tx.init(params), params, batch=batch)
    want = added(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), RATE, dense_gradient(params, batch))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=2**-8)
    assert state.collapse.dtype == jnp.float32


def test_in_bfloat16_the_gradient_is_that_of_the_rounded_parameters_and_features():
    params, batch = network(dtype=jnp.bfloat16), samples()
    feats_of = functools.partial(features, x=batch[0].astype(jnp.bfloat16))

    def low_features(params, batch):
        return feats_of(params), batch[1]

    tx = collapse_reg(1.0, features=low_features, num_classes=4)
    got, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    wide_batch = batch[0].astype(jnp.bfloat16).astype(jnp.float64), batch[1]
    np.testing.assert_allclose(state.collapse, dense_ncc(wide, wide_batch), rtol=2e-3)
    want = dense_gradient(wide, wide_batch)
    assert_trees_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), got), want, 1e-2)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("neither or both of penalty and features", {}),
        ("neither or both of penalty and features", {"penalty": dense_ncc, "features": labelled_features}),
        ("no num_classes", {"features": labelled_features}),
        ("besides a penalty", {"penalty": dense_ncc, "metric": "cdnv"}),
        ("metric is 'nc1', wanted 'ncc' or 'cdnv'", {"features": labelled_features, "metric": "nc1"}),
    ],
)
def test_bad_options_are_named(message, options):
    with pytest.raises(ValueError, match=message):
        collapse_reg(1.0, **options)
