"""Flatness under jit, vmap and scan, on sharded arrays, and lowered for accelerators that are not there."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatjax

LOSSES = [*helpers.NAMED, helpers.focal]
any_loss = pytest.mark.parametrize("loss", LOSSES)


def measure(problem, loss):
    return helpers.measured_flatness(
        {"kernel": problem.weight.swapaxes(-1, -2), "bias": problem.bias},
        problem.feats,
        problem.labels,
        weights=problem.weights,
        loss=loss,
    )


def stack(problems):
    return helpers.Problem(*(np.stack(arrays) for arrays in zip(*problems, strict=True)))


def assert_same_along_the_first_axis(got, problems, loss):
    for i, problem in enumerate(problems):
        one = helpers.Flatness(*(np.asarray(value)[i] for value in got))
        helpers.assert_same_flatness(one, measure(problem, loss), rtol=1e-13)


@pytest.mark.parametrize("field", helpers.Flatness._fields)
def test_jit_changes_nothing(field):
    public = {
        "kappa": flatjax.relative_flatness,
        "simplified": flatjax.simplified_relative_flatness,
        "maximal": flatjax.max_relative_flatness,
        "traces": flatjax.row_block_traces,
    }[field]
    problem = helpers.random_problem(3, 5, (9,))
    got = public(problem.params, problem.feats, problem.labels, weights=problem.weights)
    want = getattr(helpers.measure(problem), field)
    np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", helpers.focal])
def test_vmap_over_heads_is_a_loop_over_heads(loss):
    problem, *others = (helpers.random_problem(3, 5, (9,), seed=seed) for seed in range(2))
    problems = [problem, *(problem._replace(weight=other.weight, bias=other.bias) for other in others)]
    axes = helpers.Problem(weight=0, bias=0, feats=None, labels=None, weights=None)
    heads = stack(problems)._replace(feats=problem.feats, labels=problem.labels, weights=problem.weights)
    got = jax.vmap(functools.partial(measure, loss=loss), in_axes=(axes,))(heads)
    assert_same_along_the_first_axis(got, problems, loss)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", helpers.focal])
def test_vmap_over_batches_is_a_loop_over_batches(loss):
    problem, *others = (helpers.random_problem(3, 5, (9,), seed=seed) for seed in range(2))
    problems = [problem, *(other._replace(weight=problem.weight, bias=problem.bias) for other in others)]
    axes = helpers.Problem(weight=None, bias=None, feats=0, labels=0, weights=0)
    batches = stack(problems)._replace(weight=problem.weight, bias=problem.bias)
    got = jax.vmap(functools.partial(measure, loss=loss), in_axes=(axes,))(batches)
    assert_same_along_the_first_axis(got, problems, loss)


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", helpers.focal])
def test_a_data_set_is_streamed_by_scan(loss):
    problem = helpers.random_problem(3, 5, (4, 9))

    def add_batch(total, batch):
        feats, labels, weights = batch
        kappa = flatjax.relative_flatness(problem.params, feats, labels, weights=weights, loss=loss)
        return total + jnp.sum(weights) * kappa, kappa

    batches = (problem.feats, problem.labels, problem.weights)
    total, kappas = jax.lax.scan(add_batch, jnp.zeros(()), batches)
    assert len(kappas) == 4
    whole = flatjax.relative_flatness(problem.params, problem.feats, problem.labels, weights=problem.weights, loss=loss)
    np.testing.assert_allclose(total / problem.weights.sum(), whole, rtol=1e-13)


# On the side of the pairs (8 outputs, 16 features) and on that of the largest logit (8 outputs, 6 features).
SHARDED = [("softmax_cross_entropy", 16), ("softmax_cross_entropy", 6), (helpers.focal, 6)]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sharded", ["samples", "outputs"])
@pytest.mark.parametrize(("loss", "m"), SHARDED)
def test_eight_devices_give_what_one_gives(loss, m, sharded, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    samples, outputs = (
        NamedSharding(mesh, PartitionSpec("x" if sharded == axis else None)) for axis in ("samples", "outputs")
    )
    problem = helpers.random_problem(8, m, (32,))
    want = helpers.measure(problem, loss)
    problem = helpers.Problem(*map(jax.device_put, problem, [outputs, outputs, samples, samples, samples]))
    with jax.set_mesh(mesh):
        got = helpers.Flatness(*map(np.asarray, measure(problem, loss)))
    helpers.assert_same_flatness(got, want, rtol=1e-13)


@any_loss
def test_flatness_is_exported_for_every_platform(loss):
    problem = helpers.random_problem(3, 5, (9,)).astype(np.float32)
    args = (problem.params, problem.feats, problem.labels, problem.weights)
    function = jax.jit(
        lambda params, feats, labels, weights: helpers.measured_flatness.__wrapped__(
            params, feats, labels, weights=weights, loss=loss
        )
    )
    exported = jax.export.export(function, platforms=("cpu", "cuda", "tpu"))(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    helpers.assert_same_flatness(exported.call(*args), helpers.measure(problem, loss), rtol=1e-6)


@any_loss
def test_every_product_of_matrices_and_its_gradient_is_asked_for_in_full_precision(loss):
    problem = helpers.random_problem(3, 5, (9,)).astype(np.float32)

    def total(params, feats):
        got = helpers.measured_flatness(params, feats, problem.labels, weights=problem.weights, loss=loss)
        return sum(jnp.sum(value) for value in got)

    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(total, argnums=(0, 1)))(problem.params, problem.feats))
    assert jaxpr.count("dot_general[") > 8
    assert jaxpr.count("dot_general[") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
