"""Normalisation and dropout in a penalty, held fixed as the docstring of `flat_reg` says: exact, and nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn

from flatjax import cross_entropy, flat_reg, layer_relative_flatness, relative_flatness

from .cases import dense_kappa, samples, some_updates

X, LABELS = samples()
KEY = jax.random.key(3)
FLOAT = {"dtype": jnp.float64, "param_dtype": jnp.float64}


@pytest.fixture(autouse=True)
def _promoting():
    """What flax's own normalisation does in silence."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, *, train, deterministic):
        x = nn.BatchNorm(use_running_average=not train, name="norm", **FLOAT)(nn.Dense(7, name="body", **FLOAT)(x))
        feats = nn.Dropout(0.5, deterministic=deterministic)(jnp.tanh(x))
        return nn.Dense(4, name="head", **FLOAT)(feats), feats


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body, self.norm = nnx.Linear(5, 7, rngs=rngs, **FLOAT), nnx.BatchNorm(7, rngs=rngs, **FLOAT)
        # Without a way to say their dtype, they would be float32.
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.full(7, 0.3)), nnx.BatchStat(jnp.ones(7))
        self.drop, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(7, 4, rngs=rngs, **FLOAT)

    def __call__(self, x):
        feats = self.drop(jnp.tanh(self.norm(self.body(x))))
        return self.head(feats), feats


def linen(line):
    """The parameters, the network by a line of the docstring, and what it may not change."""
    model = Linen()
    variables = model.init(KEY, X, train=False, deterministic=True)
    params, batch_stats = variables["params"], jax.tree.map(lambda leaf: leaf + 0.3, variables["batch_stats"])
    lines = {
        "running statistics": {"train": False, "deterministic": True},
        "the same mask": {"train": False, "deterministic": False, "rngs": {"dropout": KEY}},
    }

    def network(params, x):
        return model.apply({"params": params, "batch_stats": batch_stats}, x, **lines[line])

    return params, network, batch_stats


def of_nnx(line, *, copy=True):
    model = Nnx()
    if line == "running statistics":
        model.eval()
    else:
        model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def network(params, x):
        return nnx.merge(graphdef, params, rest, copy=copy)(x)

    return params, network, rest


NETWORKS = pytest.mark.parametrize(
    ("make", "line"),
    [
        (linen, "running statistics"),
        (linen, "the same mask"),
        (of_nnx, "running statistics"),
        (of_nnx, "the same mask and the statistics of the batch"),
    ],
)


def values(tree):
    """Numbers, that are concrete: a tracer would raise."""
    data = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)
    ]
    return [np.array(x) for x in data]


def head_of(params):
    return {name: jax.tree.leaves(params["head"][name])[0] for name in ("kernel", "bias")}


@NETWORKS
def test_what_a_penalty_adds_is_the_slope_of_kappa_with_all_else_held(make, line):
    params, network, fixed = make(line)
    before = values(fixed)

    def penalty(params, batch):
        return relative_flatness(head_of(params), network(params, batch[0])[1], batch[1])

    tx, zeros = flat_reg(1.0, penalty), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    got, state = update(zeros, tx.init(params), params, batch=(X, LABELS))
    again, _ = tx.update(zeros, tx.init(params), params, batch=(X, LABELS))
    # By the statistics of the batch, a bias before the normalisation has no slope but rounding.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), again, got)
    np.testing.assert_allclose(state.kappa, dense_kappa(head_of(params), network(params, X)[1], LABELS), rtol=1e-6)

    direction, step = some_updates(params), 1e-5
    slope = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(direction), strict=True))
    kappas = [
        dense_kappa(head_of(moved), network(moved, X)[1], LABELS)
        for moved in (jax.tree.map(lambda p, d, s=sign: p + s * step * d, params, direction) for sign in (1, -1))
    ]
    assert abs(slope) > 0.1
    np.testing.assert_allclose(slope, (kappas[0] - kappas[1]) / (2 * step), rtol=1e-6)
    for a, b in zip(values(fixed), before, strict=True):
        np.testing.assert_array_equal(a, b)


@NETWORKS
def test_a_layer_is_measured_with_all_else_held(make, line):
    params, network, fixed = make(line)
    before = values(fixed)

    def loss(params, x, labels):
        return cross_entropy(network(params, x)[0], labels).mean()

    got = layer_relative_flatness(loss, params, X, LABELS, layer="head/kernel")
    np.testing.assert_allclose(got.value, dense_kappa(head_of(params), network(params, X)[1], LABELS), rtol=1e-9)
    for a, b in zip(values(fixed), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_a_copy_flax_refuses_to_write_to_statistics_inside_of_a_derivative():
    params, network, _ = of_nnx("the statistics of the batch", copy=False)
    with pytest.raises(errors.TraceContextError, match="Cannot mutate"):
        jax.grad(lambda params: jnp.sum(network(params, X)[0]))(params)


def test_statistics_that_change_go_with_the_batch():
    model = Nnx()
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def penalty(params, batch):
        rest, x, labels = batch
        return relative_flatness(head_of(params), nnx.merge(graphdef, params, rest, copy=True)(x)[1], labels)

    tx, zeros = flat_reg(1.0, penalty), jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(tx.update)
    for shift in (0.0, 0.7):
        model.norm.mean[...] += shift
        _, _, rest = nnx.split(model, nnx.Param, ...)
        _, state = update(zeros, tx.init(params), params, batch=(rest, X, LABELS))
        np.testing.assert_allclose(state.kappa, dense_kappa(head_of(params), model(X)[1], LABELS), rtol=1e-6)
