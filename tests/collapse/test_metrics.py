"""Each metric of the moments against its formula, in all its conventions, in tiles and over devices."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import flatjax.collapse as fc
from flatjax import ClassMoments, CollapseReport, collapse_report

from . import oracle
from .cases import FEW_CLASSES, MANY_CLASSES, METRICS, collapsed_case, measure, moments_of, random_case, simplex

TALL = (5, 4, 0, 6, 5, 1, 4, 6, 5, 4, 3, 0, 5, 2, 9, 1), 4
SHAPES = {"few": FEW_CLASSES, "many": MANY_CLASSES, "tall, with empty and single classes": TALL}
ROUNDING = {"float64": {"rtol": 2e-12, "atol": 2e-13}, "float32": {"rtol": 1e-5, "atol": 1e-6}}

# Of tiles of which the last is not full.
report_of = functools.partial(collapse_report, tile_size=3)


def moments_of_case(case):
    """From batches of one size, for which one program is enough."""
    moments = ClassMoments.init(len(case.bias), case.feats.shape[1], covariance=True, dtype=case.feats.dtype)
    for batch in batches_of(case):
        moments = moments.update(*batch)
    return moments


def batches_of(case):
    size = next(n for n in (10, 12) if len(case.feats) % n == 0)
    for start in range(0, len(case.feats), size):
        yield tuple(x[start : start + size] for x in (case.feats, case.labels, case.weights))


def formulas(case, min_count=2):
    """Every field of a `CollapseReport`."""
    kept, means, variances, within = oracle.classes_of(*case[2:], len(case.bias), min_count)
    centred, rows = means - means.mean(axis=0), case.kernel.T.astype(float)[kept]
    of_means, of_classifier = oracle.nc2(centred), oracle.nc2(rows)
    names = {name: f"nc2_{name}" for name in ("equinorm", "equiangularity", "cosine_std")}
    names |= {name: name for name in ("gnc2_mean", "gnc2_variation")}
    cdnv, counts = oracle.cdnv(means, variances), np.bincount(case.labels, minlength=len(case.bias))
    num_kept, num_features = len(kept), centred.shape[1]
    return {
        "nc1": oracle.nc1(means, within),
        **{f"{new}_means": of_means[name] for name, new in names.items()},
        **{f"{new}_classifier": of_classifier[name] for name, new in names.items()},
        "nc2_etf_error": of_means["etf_error"],
        "nc2_etf_error_classifier": of_classifier["etf_error"],
        "nc2_etf_floor": np.sqrt(2 - 2 * np.sqrt(min(1, num_features / (num_kept - 1)))),
        **oracle.duality(rows, centred),
        "cdnv": cdnv,
        "ncc": num_kept * (num_kept - 1) * cdnv,
        "num_classes_kept": num_kept,
        "num_classes_empty": np.sum(counts == 0),
        "num_classes_single": np.sum(counts == 1),
        "num_directions": min(num_kept - 1, num_features),
    }


def assert_report(actual, wanted, *, rtol, atol):
    for name in CollapseReport._fields:
        np.testing.assert_allclose(getattr(actual, name), wanted[name], rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_field_of_a_report_is_its_formula(shape, dtype):
    case = random_case(*shape).astype(dtype)
    moments = moments_of_case(case)
    assert_report(report_of(moments, case.params), formulas(case), **ROUNDING[dtype])


@pytest.mark.parametrize("min_count", [1, 2, 5])
def test_classes_with_enough_samples_alone_are_measured(min_count):
    case = random_case(*TALL)
    actual = report_of(moments_of_case(case), case.params, min_count=min_count)
    wanted = formulas(case, min_count)
    if min_count == 5:  # the covariance has the samples of all classes
        assert actual.nc1 is None
        assert actual.num_directions is None
        missing = {"nc1": 0, "num_directions": 0}
        actual, wanted = actual._replace(**missing), wanted | missing
    assert_report(actual, wanted, **ROUNDING["float64"])


def test_a_report_has_what_the_snapshot_has():
    case = random_case((9, 0, 8, 1, 11, 1), 4)
    report, snapshot = report_of(moments_of_case(case), case.params), measure(case)
    for name in set(METRICS) - {"nc4"}:
        np.testing.assert_allclose(getattr(report, name), getattr(snapshot, name), rtol=1e-11, atol=1e-13, err_msg=name)


def test_each_metric_alone_is_that_of_the_report_and_each_convention_its_formula():
    case = random_case(*TALL)
    moments, wanted = moments_of_case(case), formulas(case)
    kept, means, variances, _ = oracle.classes_of(*case[2:], len(case.bias))
    counts = np.bincount(case.labels, minlength=16)[kept]
    centred, rows = means - means.mean(axis=0), case.kernel.T[kept]
    cosines = np.sum(rows * centred, axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(centred, axis=1)

    @jax.jit
    def measured(moments, params):
        return [
            fc.cdnv(moments),
            fc.cdnv(moments, ddof=1),
            fc.ncc(moments),
            fc.nc1(moments),
            fc.nc1(moments, divided=False),
            fc.equinorm(moments),
            fc.equinorm(moments, ddof=0),
            fc.equinorm(moments, params, ddof=0),
            fc.equiangularity(moments),
            fc.equiangularity(moments, params),
            fc.cosine_std(moments),
            fc.cosine_std(moments, params),
            fc.etf_error(moments),
            fc.etf_error(moments, params),
            fc.etf_floor(moments),
            fc.gnc2(moments).mean,
            fc.gnc2(moments, params).variation,
            fc.nc3(moments, params),
            fc.nc3(moments, params, squared=False),
            fc.unc3(moments, params),
            fc.unc3(moments, params, ddof=1),
        ]

    formula_of_each = [
        wanted["cdnv"],
        oracle.cdnv(means, variances * counts / (counts - 1)),
        wanted["ncc"],
        wanted["nc1"],
        len(kept) * wanted["nc1"],
        wanted["nc2_equinorm_means"],
        oracle.nc2(centred, ddof=0)["equinorm"],
        oracle.nc2(rows, ddof=0)["equinorm"],
        wanted["nc2_equiangularity_means"],
        wanted["nc2_equiangularity_classifier"],
        wanted["nc2_cosine_std_means"],
        wanted["nc2_cosine_std_classifier"],
        wanted["nc2_etf_error"],
        wanted["nc2_etf_error_classifier"],
        wanted["nc2_etf_floor"],
        wanted["gnc2_mean_means"],
        wanted["gnc2_variation_classifier"],
        wanted["nc3"],
        np.sqrt(wanted["nc3"]),
        wanted["unc3"],
        np.std(cosines, ddof=1) / abs(np.mean(cosines)),
    ]
    np.testing.assert_allclose(measured(moments, case.params), formula_of_each, rtol=2e-12)


def test_a_simplex_frame_has_the_report_zero():
    case = collapsed_case(simplex(4, 9), FEW_CLASSES[0])
    actual = report_of(moments_of_case(case), case.params)
    nonzero = {"gnc2_mean_means", "gnc2_mean_classifier", "num_classes_kept", "num_directions"}
    for name in set(CollapseReport._fields) - nonzero:
        np.testing.assert_allclose(getattr(actual, name), 0, atol=1e-14, err_msg=name)
    # Of unit vectors with the cosine −1/3 the distance is √(8/3).
    np.testing.assert_allclose([actual.gnc2_mean_means, actual.gnc2_mean_classifier], -np.log(8 / 3) / 2, rtol=1e-14)


def test_a_within_class_variance_of_1e_12_of_the_squared_distances_is_right_in_float32_streaming():
    case = random_case((40, 35, 45, 40, 38, 42), 4, spread=1e-6).astype("float32")
    actual = report_of(moments_of_case(case), case.params)
    wanted = formulas(case)
    for name in ("cdnv", "ncc", "nc1"):
        np.testing.assert_allclose(getattr(actual, name), wanted[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(("scale", "weight"), [(1e-10, 1), (1e17, 1), (1e13, 1e12), (1e-10, 1e12)], ids=str)
def test_metrics_of_variability_know_no_unit_of_features_or_weights_in_float32(scale, weight):
    case = random_case(*MANY_CLASSES, spread=1e-3)
    case = case._replace(feats=scale * case.feats, weights=weight * case.weights).astype("float32")
    actual, wanted = report_of(moments_of_case(case), case.params), formulas(case)
    for name in ("cdnv", "ncc", "nc1"):
        np.testing.assert_allclose(getattr(actual, name), wanted[name], rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "bias"),
    [(FEW_CLASSES, True), (MANY_CLASSES, True), (TALL, True), (TALL, False)],
    ids=["few", "many", "tall, with empty and single classes", "without bias"],
)
def test_nc4_of_a_stream_is_that_of_all_samples_with_and_without_bias(shape, bias):
    case = random_case(*shape)
    moments = moments_of_case(case)
    case = case._replace(kernel=0.2 * case.kernel + np.asarray(moments.means).T)  # often right
    parts = [fc.nc4(moments, case.params, *batch, bias=bias, tile_size=3) for batch in batches_of(case)]
    actual = functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), parts)
    wanted = oracle.neural_collapse(*case._replace(bias=case.bias * bias))["nc4"]
    assert 0 < wanted < 1
    np.testing.assert_allclose(actual.share, wanted, rtol=1e-12)
    kept = np.bincount(case.labels, minlength=len(case.bias)) >= 2
    np.testing.assert_allclose(actual.total, np.sum(case.weights[kept[case.labels]]), rtol=1e-12)
    np.testing.assert_allclose(actual.standard_error, np.sqrt(wanted * (1 - wanted) / actual.total), rtol=1e-12)


def test_nc4_of_other_samples_asks_which_mean_is_nearest_to_them():
    # Tiles of more classes than are compared by their differences, on a line, where one sees which is nearest.
    means = np.arange(300.0)[:, None]
    moments = moments_of(np.concatenate([means, means]), np.tile(np.arange(300), 2), None, 300)
    rng = np.random.default_rng(0)
    feats, labels = rng.uniform(0, 299, (50, 1)), rng.integers(0, 300, 50)
    # ‖h − μ‖² is least where 2hμ − μ² is largest: this network is the nearest mean.
    params = {"kernel": 2 * means.T, "bias": -(means[:, 0] ** 2)}
    assert fc.nc4(moments, params, feats, labels).share == 0
    assert fc.nc4(moments, params | {"bias": params["bias"] - 2 * means[:, 0]}, feats, labels).share == 1


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_means_split_by_classes_among_devices_have_the_report_of_all(axis_type):
    case = random_case(*TALL)
    moments = moments_of_case(case)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    by_class, whole = NamedSharding(mesh, P("model")), NamedSharding(mesh, P())
    params = {"embedding": case.kernel.T, "bias": case.bias}
    with jax.set_mesh(mesh):
        placed = jax.device_put(moments, jax.tree.map(lambda x: by_class if x.shape[:1] == (16,) else whole, moments))
        actual = report_of(placed, jax.device_put(params, by_class))
    assert_report(actual, formulas(case), **ROUNDING["float64"])


def test_devices_with_classes_of_their_own_have_together_the_report_of_all():
    case = random_case(*TALL)
    moments = moments_of_case(case)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(lambda x: P("model") if x.shape[:1] == (16,) else P(), moments)
    params = {"embedding": case.kernel.T, "bias": case.bias}
    compute = functools.partial(collapse_report, axis_name="model")
    compute = jax.shard_map(compute, mesh=mesh, in_specs=(specs, P("model")), out_specs=P())
    assert_report(jax.jit(compute)(moments, params), formulas(case), **ROUNDING["float64"])


def test_gradients_of_a_report_are_finite_differences():
    case = random_case(*TALL)
    kept_axes = [name for name in CollapseReport._fields if not name.startswith("num_") and "floor" not in name]

    def metrics(kernel, feats):
        moments = moments_of(feats, case.labels, case.weights, len(case.bias), covariance=True)
        report = collapse_report(moments, {"kernel": kernel, "bias": case.bias}, tile_size=3)
        values = jnp.stack([getattr(report, name) for name in kept_axes])
        return values, values

    # One program for the values and their derivatives.
    derivatives = jax.jit(jax.jacrev(metrics, (0, 1), has_aux=True))
    rng = np.random.default_rng(0)
    along, step = [rng.normal(size=x.shape) for x in (case.kernel, case.feats)], 1e-5
    after, before = (derivatives(case.kernel + by * along[0], case.feats + by * along[1])[1] for by in (step, -step))
    (by_kernel, by_feats), _ = derivatives(case.kernel, case.feats)
    actual = np.tensordot(by_kernel, along[0], 2) + np.tensordot(by_feats, along[1], 2)
    for name, x, y in zip(kept_axes, actual, (after - before) / (2 * step), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7, err_msg=name)


def test_losses_of_variability_have_finite_gradients_at_exact_collapse_and_with_empty_classes():
    case = collapsed_case(np.concatenate([simplex(3, 4), np.ones((3, 4))]), (5, 0, 4, 6, 1, 0)).astype("float32")

    @jax.jit
    def losses_and_gradients(feats):
        def losses(feats):
            moments = moments_of(feats, case.labels, None, 6)
            values = jnp.stack([fc.cdnv(moments), fc.ncc(moments)])
            return values, values

        gradients, values = jax.jacrev(losses, has_aux=True)(feats)
        return values, gradients

    values, gradients = losses_and_gradients(case.feats)
    assert not np.any(values)
    assert np.all(np.isfinite(gradients))
    spread = case.feats + 0.01 * np.random.default_rng(0).normal(size=case.feats.shape).astype("float32")
    before, gradients = losses_and_gradients(spread)
    for metric in range(2):
        after, _ = losses_and_gradients(spread - 1e-4 * gradients[metric])
        assert 0 < after[metric] < before[metric]


def test_a_bad_sample_or_head_leaves_no_metric_that_looks_like_one():
    case = random_case(*MANY_CLASSES)
    moments = moments_of_case(case)
    feats = case.feats.copy()
    feats[3, 1] = np.nan
    floating = [name for name in CollapseReport._fields if not name.startswith("num_")]
    for report, has_value in (
        (report_of(moments_of_case(case._replace(feats=feats)), case.params), []),
        (report_of(moments, case.params | {"bias": np.full(6, np.inf)}), ["nc1"]),
        (report_of(moments._replace(counts=jnp.array([5, 1, 1, 0, 0, 0], jnp.int32)), case.params), []),
    ):
        assert [name for name in floating if not np.isnan(getattr(report, name))] == has_value

    def nc4(moments, params, feats):
        return fc.nc4(moments, params, feats[:10], case.labels[:10], case.weights[:10], tile_size=3)

    for decisions in (
        nc4(moments, case.params, feats),
        nc4(moments, case.params | {"bias": np.full(6, np.nan)}, case.feats),
        nc4(moments_of_case(case._replace(feats=feats)), case.params, case.feats),
    ):
        assert np.isnan(decisions.share)


def test_what_does_not_fit_the_moments_is_refused():
    case = random_case(*MANY_CLASSES)
    moments = ClassMoments.init(6, 4)
    with raises(ValueError, r"the head has 5 outputs of 4 features, but the moments are of 6 classes and 4 features"):
        fc.nc3(moments, {"kernel": case.kernel[:, :5]})
    with raises(ValueError, "NC1 needs the covariance within the classes"):
        fc.nc1(moments)
    with raises(ValueError, "min_count is 3, but the covariance is of all samples: wanted 1 or 2"):
        fc.nc1(ClassMoments.init(6, 4, covariance=True), min_count=3)
    with raises(ValueError, "min_count is 1 and ddof 1"):
        fc.cdnv(moments, min_count=1, ddof=1)
    with raises(ValueError, "the moments are of 1 class"):
        fc.cdnv(ClassMoments.init(1, 4))


def test_what_is_no_class_moments_is_refused_by_name():
    head = {"kernel": jnp.ones((4, 6))}
    for metric in (collapse_report, fc.cdnv, fc.nc1, lambda moments: fc.central_path(moments, head)):
        with raises(TypeError, "moments is a dict, wanted ClassMoments"):
            metric(head)
        with raises(TypeError, r"moments is an array of shape \(9, 4\), wanted ClassMoments"):
            metric(jnp.ones((9, 4)))
