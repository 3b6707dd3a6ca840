"""κ, κ̂, κ_max and T against the dense Hessian, over shapes, layouts, losses, labels and dtypes."""

import functools
from typing import NamedTuple

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flatjax
from flatjax.flatness import autodiff


class Case(NamedTuple):
    d: int
    m: int
    leading: tuple[int, ...]
    loss: str
    labels: str = "classes"
    bias: bool = True
    weights: bool = True
    layout: str = "kernel"
    as_callable: bool = False

    def __str__(self) -> str:
        return "-".join(str(value) for value in self if value is not True and value is not False)


CE, SE, BCE = helpers.NAMED
ORACLE_CASES = [
    # Softmax on the side of the pairs (few outputs), then on that of the largest logit.
    Case(3, 5, (9,), CE),
    Case(2, 7, (2, 3), CE, "mass", bias=False, weights=False, layout="embedding"),
    Case(7, 2, (5,), CE, "distribution"),
    Case(4, 1, (), CE, layout="embedding"),
    Case(3, 5, (2, 3), SE, "targets", layout="embedding"),
    Case(5, 3, (1,), SE, bias=False, weights=False),
    Case(5, 3, (2, 3), BCE, "distribution", bias=False, layout="embedding"),
    Case(1, 3, (7,), BCE, "binary"),
    # Any callable: κ from the columns of W where d > m, from its rows where not.
    Case(6, 2, (2, 3), CE, "mass", weights=False, as_callable=True, layout="embedding"),
    Case(3, 5, (5,), "focal"),
    Case(4, 3, (7,), "pseudo_huber", "targets"),
    Case(1, 1, (), "pseudo_huber", "targets", bias=False),
    Case(3, 4, (2, 3), "tempered", "tempered", weights=False),
]


def measure(case: Case, problem: helpers.Problem) -> helpers.Flatness:
    params = {case.layout: problem.weight.T if case.layout == "kernel" else problem.weight}
    if case.bias:
        params["bias"] = problem.bias
    return helpers.measured_flatness(
        params,
        problem.feats,
        problem.labels,
        weights=problem.weights if case.weights else None,
        loss=getattr(helpers, case.loss) if case.as_callable or case.loss not in helpers.NAMED else case.loss,
    )


def truth(case: Case, problem: helpers.Problem) -> helpers.Flatness:
    return helpers.dense_flatness(getattr(helpers, case.loss), problem, bias=case.bias, weights=case.weights)


@pytest.mark.parametrize("case", ORACLE_CASES, ids=str)
def test_flatness_is_that_of_the_dense_hessian(case):
    problem = helpers.random_problem(case.d, case.m, case.leading, case.labels, seed=case.d * case.m)
    got = measure(case, problem)
    assert all(value.dtype == jnp.float64 for value in got)
    assert got.traces.shape == (case.d, case.d)
    # Sums of at most 200 terms of order 1 to 10, at 2e-16 each.
    helpers.assert_same_flatness(got, truth(case, problem), rtol=1e-12)


def test_a_softmax_over_one_class_is_exactly_flat():
    assert all(np.all(value == 0) for value in helpers.measure(helpers.random_problem(1, 3, (5,))))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(6, 4, (5,), CE), "float32"),
        (Case(5, 3, (2, 3), BCE), "float32"),
        (Case(3, 5, (9,), CE), "bfloat16"),
        (Case(3, 5, (5,), SE, as_callable=True), "float16"),
    ],
    ids=str,
)
def test_inputs_of_at_most_float32_are_computed_on_in_float32(case, dtype):
    problem = helpers.random_problem(case.d, case.m, case.leading, case.labels).astype(jnp.dtype(dtype))
    got = measure(case, problem)
    assert all(value.dtype == jnp.float32 for value in got)
    # The oracle takes the rounded inputs to float64: what is left is float32's own rounding.
    helpers.assert_same_flatness(got, truth(case, problem), rtol=2e-6)


@pytest.mark.parametrize("wide", ["kernel", "bias", "feats", "weights", "labels"])
def test_float64_in_any_input_gives_float64(wide):
    problem = helpers.random_problem(3, 4, (5,), "distribution").astype(np.float32)
    arrays = {**problem.params, "feats": problem.feats, "labels": problem.labels, "weights": problem.weights}
    arrays[wide] = arrays[wide].astype(np.float64)
    params = {name: arrays.pop(name) for name in ("kernel", "bias")}
    for value in jax.eval_shape(helpers.measured_flatness, params, **arrays):
        assert value.dtype == jnp.float64


def test_the_mass_of_soft_labels_scales_the_hessian():
    problem = helpers.random_problem(7, 2, (5,), "distribution")
    once, twice = helpers.measure(problem), helpers.measure(problem._replace(labels=2 * problem.labels))
    helpers.assert_same_flatness(twice, helpers.Flatness(*(2 * np.asarray(x) for x in once)), rtol=1e-14)


def test_kappa_of_a_softmax_head_does_not_depend_on_the_labels():
    problem = helpers.random_problem(3, 5, (9,))
    other = problem._replace(labels=(problem.labels + 1) % 3)
    helpers.assert_same_flatness(helpers.measure(other), helpers.measure(problem), rtol=1e-15)


kappa = jax.jit(flatjax.relative_flatness, static_argnames="loss")


@pytest.mark.parametrize("dtype", ["bool", "int32"])
@pytest.mark.parametrize("loss", helpers.NAMED)
def test_targets_may_be_of_any_real_dtype(loss, dtype):
    problem = helpers.random_problem(3, 5, (9,), "binary")
    got, want = (
        kappa(problem.params, problem.feats, labels, loss=loss)
        for labels in (problem.labels.astype(dtype), problem.labels)
    )
    np.testing.assert_allclose(got, want, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32"])
def test_class_labels_may_be_of_any_integer_dtype(dtype):
    problem = helpers.random_problem(256, 2, (4,))  # of which int8 does not hold the number, nor uint8
    labels = np.array([0, 1, 2, min(np.iinfo(dtype).max, 255)])
    got, want = (kappa(problem.params, problem.feats, each) for each in (labels.astype(dtype), labels))
    np.testing.assert_allclose(got, want, rtol=1e-15)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float16"])
def test_sample_weights_may_be_of_any_real_dtype(dtype):
    problem = helpers.random_problem(3, 5, (9,))
    mask = problem.weights > 0.5
    got = kappa(problem.params, problem.feats, problem.labels, weights=mask.astype(dtype))
    want = helpers.measure(problem._replace(weights=mask.astype(float))).kappa
    np.testing.assert_allclose(got, want, rtol=1e-15)


@pytest.mark.parametrize(("d", "m", "in_flight"), [(7, 3, 1), (7, 9, 5 * 7 * 3)])
def test_directions_in_chunks_give_what_they_give_at_once(monkeypatch, d, m, in_flight):
    problem = helpers.random_problem(d, m, (5,))
    want = helpers.dense_flatness(helpers.focal, problem, weights=False)
    monkeypatch.setattr(autodiff, "_ELEMENTS_IN_FLIGHT", in_flight)
    # A new function, since jit has kept the chunks of others.
    in_chunks = jax.jit(functools.partial(flatjax.relative_flatness, loss=helpers.focal))
    np.testing.assert_allclose(in_chunks(problem.params, problem.feats, problem.labels), want.kappa, rtol=1e-12)


def test_the_state_of_a_flax_layer_goes_through_jit_and_grad():
    problem = helpers.random_problem(3, 5, (9,)).astype(np.float32)
    state = nnx.state(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    value, gradient = jax.jit(jax.value_and_grad(flatjax.relative_flatness))(state, problem.feats, problem.labels)
    problem = problem._replace(weight=np.asarray(state["kernel"][...]).T, bias=np.asarray(state["bias"][...]))
    want = helpers.dense_flatness(helpers.softmax_cross_entropy, problem, weights=False).kappa
    np.testing.assert_allclose(value, want, rtol=2e-6)
    assert isinstance(gradient, nnx.State)
    assert gradient["kernel"][...].shape == (5, 3)


def test_a_bias_of_none_is_no_bias():
    problem = helpers.random_problem(3, 5, (9,))
    kernel = problem.params["kernel"]
    got, want = (
        flatjax.relative_flatness(params, problem.feats, problem.labels)
        for params in ({"kernel": kernel, "bias": None}, {"kernel": kernel})
    )
    np.testing.assert_allclose(got, want, rtol=1e-15)
