"""The record under jit, vmap, scan and grad, over devices, and exported."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax import neural_collapse

from .cases import (
    FEW_CLASSES,
    MANY_CLASSES,
    METRICS,
    SHAPES,
    Case,
    assert_close,
    collapsed_case,
    gradients,
    measure,
    metrics_of,
    random_case,
    simplex,
)

jitted = jax.jit(neural_collapse, static_argnames="num_classes")
CONSTANT = ("nc2_etf_floor", "nc4")
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}


def test_jit_changes_nothing():
    case = random_case(*FEW_CLASSES)
    inside = jitted(case.params, case.feats, case.labels, num_classes=4, weights=case.weights)
    assert_close(inside, measure(case), **ROUNDING)


@pytest.mark.parametrize(
    "measure_all",
    [jax.vmap(measure), lambda batch: jax.lax.scan(lambda carry, case: (carry, measure(case)), None, batch)[1]],
    ids=["vmap", "scan"],
)
def test_many_snapshots_at_once_are_those_one_by_one(measure_all):
    cases = [random_case(counts, 9, seed=n) for n, counts in enumerate([FEW_CLASSES[0], (12, 0, 11, 1), (24, 0, 0, 0)])]
    actual = jax.jit(measure_all)(Case(*map(np.stack, zip(*cases, strict=True))))
    for n, case in enumerate(cases):
        for name in METRICS:
            np.testing.assert_allclose(getattr(actual, name)[n], getattr(measure(case), name), **ROUNDING, err_msg=name)


@pytest.mark.parametrize(
    "shape",
    [*SHAPES.values(), ((9, 0, 8, 1, 11, 1), 4), ((11, 0, 12, 1), 9)],
    ids=[*SHAPES, "three classes kept", "two classes kept"],
)
def test_gradients_are_finite_differences(shape):
    case = random_case(*shape)
    case.weights[::7] = 0
    by_metric = gradients(case)
    step = 1e-5
    for seed in range(3):
        rng = np.random.default_rng(seed)
        along = [rng.normal(size=x.shape) for x in case[:3]]

        def moved(by, along=along):
            return measure(Case(*(x + by * v for x, v in zip(case[:3], along, strict=True)), *case[3:]))

        after, before = moved(step), moved(-step)
        for name in set(METRICS) - set(CONSTANT):
            wanted = (getattr(after, name) - getattr(before, name)) / (2 * step)
            actual = sum(np.sum(g * v) for g, v in zip(by_metric[name], along, strict=True))
            # Values of order 1 rounded to 1e-15 over the step, and the step squared times third derivatives.
            np.testing.assert_allclose(actual, wanted, rtol=1e-7, atol=1e-8, err_msg=name)


def test_forward_mode_is_reverse_mode():
    case = random_case(*MANY_CLASSES)
    along = tuple(np.random.default_rng(0).normal(size=x.shape) for x in case[:3])
    forward = jax.jit(lambda case, along: jax.jvp(metrics_of(case), case[:3], along)[1])(case, along)
    for name, reverse in gradients(case).items():
        wanted = sum(np.sum(g * v) for g, v in zip(reverse, along, strict=True))
        np.testing.assert_allclose(forward[name], wanted, **ROUNDING, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_decisions_and_the_floor_have_the_gradient_zero(shape):
    by_metric = gradients(random_case(*shape))
    assert not any(np.any(x) for name in CONSTANT for x in by_metric[name])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("means", "counts"),
    [
        (simplex(4, 9), (6, 6, 6, 6)),
        (np.concatenate([simplex(2, 9), np.ones((2, 9))]), (12, 11, 0, 1)),
        (np.concatenate([simplex(5, 4), np.ones((1, 4))]), (6, 6, 6, 6, 6, 0)),
        (np.concatenate([simplex(4, 4), np.ones((2, 4))]), (7, 7, 7, 8, 0, 1)),
        (simplex(6, 5)[:, :4], (5, 5, 5, 5, 5, 5)),
        (np.random.default_rng(0).normal(size=(6, 4)), (5, 5, 5, 5, 5, 5)),
    ],
    ids=[
        "simplex",
        "two classes, an empty and a single one",
        "simplex that fills its space, an empty class",
        "simplex, an empty and a single class",
        "ETF floor",
        "no spread around any means",
    ],
)
def test_gradients_are_finite_at_exact_collapse(means, counts, dtype):
    by_metric = gradients(collapsed_case(means, counts).astype(dtype))
    assert [name for name, by in by_metric.items() if not all(np.all(np.isfinite(x)) for x in by)] == []
    # No spread is the least there is.
    assert max(np.max(np.abs(x)) for name in ("nc1", "cdnv", "ncc") for x in by_metric[name]) < 64 * np.finfo(dtype).eps


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_batch_on_eight_devices_is_that_on_one(axis_type):
    case = random_case(*FEW_CLASSES)

    @jax.jit
    def gradient_and_record(case):
        def variability(feats):
            record = measure(case._replace(feats=feats))
            return record.nc1 + record.ncc, record

        return jax.grad(variability, has_aux=True)(case.feats)

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(axis_type,))
    replicated, by_sample = NamedSharding(mesh, P()), NamedSharding(mesh, P("batch"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(case, Case(replicated, replicated, by_sample, by_sample, by_sample))
        gradient, record = gradient_and_record(placed)
    assert_close(record, measure(case), **ROUNDING)
    wanted = gradients(case)
    np.testing.assert_allclose(gradient, wanted["nc1"][2] + wanted["ncc"][2], **ROUNDING)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_snapshots_are_exported_for_every_platform(dtype):
    case = random_case(*FEW_CLASSES).astype(dtype)
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jitted, platforms=platforms)(
        case.params, case.feats, case.labels, num_classes=4, weights=case.weights
    )
    assert exported.platforms == platforms
    assert [x.dtype for x in exported.out_avals] == [x.dtype for x in jax.tree.leaves(measure(case))]


def test_every_matrix_product_is_as_precise_as_its_inputs_on_any_platform():
    case = random_case(*FEW_CLASSES).astype("float32")
    lowered = jitted.lower(case.params, case.feats, case.labels, num_classes=4, weights=case.weights).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert products
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []
