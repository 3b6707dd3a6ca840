"""A class mean very much further than the others costs the others no digit, or what it costs is NaN: never collapse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flatjax import ClassMoments, collapse_report
from flatjax.collapse.inverses import Rows, inverse_of_gram, pseudo_inverse

from . import oracle
from .cases import METRICS, Case, measure

SHAPES = {"as many": (5, 4), "fewer classes": (4, 9), "more classes": (16, 4), "two": (2, 3), "one feature": (4, 1)}
# Other tests have as many of the same shapes.
SAMPLES = {"as many": 60, "fewer classes": 24, "more classes": 192, "two": 24, "one feature": 24}
DISTANCES = (1.0, 1e3, 1e6, 1e9)


def far_case(shape, distance, *, direction="all", classes=(1,), seed=0, dtype="float32"):
    """Classes of 6 or 12 samples of width 0.05 about means of order 1, and some moved far off."""
    num_classes, num_features = SHAPES[shape]
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(num_classes), SAMPLES[shape] // num_classes))
    means = rng.normal(size=(num_classes, num_features))
    feats = means[labels] + 0.05 * rng.normal(size=(len(labels), num_features))
    for number, label in enumerate(classes):
        shift = rng.normal(size=num_features) + (1 + number)
        feats[labels == label] += distance * (np.eye(num_features)[-1] if direction == "one" else shift)
    kernel = rng.normal(size=(num_features, num_classes))
    return Case(kernel, np.zeros(num_classes), feats, labels, rng.uniform(0.5, 2, len(labels))).astype(dtype)


def nc1_by_definition(case):
    """In float64, the pseudo-inverse cut where float64 rounds."""
    _, means, _, _ = oracle.classes_of(case.feats, case.labels, case.weights, len(case.bias))
    coordinates = (case.feats - means[case.labels]) @ np.linalg.pinv(means - means.mean(axis=0), rcond=1e-13)
    return np.average(np.sum(coordinates**2, axis=1), weights=case.weights.astype(float))


def by_definition(case):
    _, means, variances, _ = oracle.classes_of(case.feats, case.labels, case.weights, len(case.bias))
    return {"nc1": nc1_by_definition(case), "cdnv": oracle.cdnv(means, variances)}


def moments_in_batches(case):
    moments = ClassMoments.init(len(case.bias), case.feats.shape[1], covariance=True)
    for part in range(3):
        moments = moments.update(case.feats[part::3], case.labels[part::3], case.weights[part::3])
    return moments


@pytest.mark.parametrize("direction", ["all", "one"])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_mean_far_off_changes_variability_as_float64_says(shape, distance, direction):
    for far in range(min(3, SHAPES[shape][0])):
        case = far_case(shape, distance, direction=direction, classes=(far,), seed=far)
        want, got = by_definition(case), measure(case)
        np.testing.assert_allclose([got.nc1, got.cdnv], [want["nc1"], want["cdnv"]], rtol=3e-5)
        assert got.num_directions == min(SHAPES[shape][0] - 1, SHAPES[shape][1])


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_mean_far_off_changes_a_stream_as_float64_says(shape, distance):
    case = far_case(shape, distance)
    want, report = by_definition(case), collapse_report(moments_in_batches(case))
    np.testing.assert_allclose(report.cdnv, want["cdnv"], rtol=3e-5)
    # The covariance is rounded where the far class is wide, as its features are.
    np.testing.assert_allclose(report.nc1, want["nc1"], rtol=3e-2 if distance > 1e6 else 1e-3)
    assert report.num_directions == min(SHAPES[shape][0] - 1, SHAPES[shape][1])


@pytest.mark.parametrize("distance", [1e5, 1e9])
def test_two_means_far_off_in_different_directions_are_one_more(distance):
    for shape in ("fewer classes", "more classes"):
        case = far_case(shape, distance, classes=(0, 2))
        want, got = by_definition(case), measure(case)
        np.testing.assert_allclose([got.nc1, got.cdnv], [want["nc1"], want["cdnv"]], rtol=1e-3)


@pytest.mark.parametrize("distance", [1e4, 1e6, 1e9])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_of_the_means_far_off_in_one_place_are_right_or_nan_but_never_collapsed(shape, distance):
    num_classes = SHAPES[shape][0]
    for seed in range(4):
        case = far_case(shape, 0, seed=seed)
        shift = distance * np.random.default_rng(seed).normal(size=case.feats.shape[1])
        moved = case.feats + np.where((case.labels < num_classes // 2)[:, None], shift, 0)
        case = case._replace(feats=moved.astype("float32"))
        want = nc1_by_definition(case)
        for got in (measure(case).nc1, collapse_report(moments_in_batches(case)).nc1):
            assert np.isnan(got) or abs(float(got) / want - 1) < 0.2, (seed, got, want)


@pytest.mark.parametrize("distance", [1e6, 1e9])
def test_nc2_nc3_and_nc4_with_one_mean_far_off_are_those_of_float64(distance):
    case = far_case("fewer classes", distance)
    want = oracle.neural_collapse(*case)
    got = measure(case)
    for name in sorted(set(METRICS) - {"nc1"}):
        np.testing.assert_allclose(getattr(got, name), want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_directions_that_rounding_makes_one_have_no_uniformity():
    report = collapse_report(moments_in_batches(far_case("more classes", 1e9)))
    assert not np.isfinite(report.gnc2_mean_means)
    report = collapse_report(moments_in_batches(far_case("more classes", 1e2)))
    case = far_case("more classes", 1e2)
    _, means, _, _ = oracle.classes_of(case.feats, case.labels, case.weights, 16)
    want = oracle.nc2(means - means.mean(axis=0))["gnc2_mean"]
    np.testing.assert_allclose(report.gnc2_mean_means, want, rtol=1e-4)


@functools.cache
def report_of_split(check_vma):
    mesh = jax.make_mesh((8,), ("classes",), axis_types=(AxisType.Auto,))
    specs = ClassMoments(P("classes"), P("classes"), P("classes"), P("classes"), P(), P())
    report = functools.partial(collapse_report, axis_name="classes")
    return jax.jit(jax.shard_map(report, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=check_vma))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("distance", [1.0, 1e6, 1e9])
def test_classes_split_among_devices_have_what_one_device_has(distance, check_vma):
    whole = moments_in_batches(far_case("more classes", distance, classes=(5,)))
    split, want = report_of_split(check_vma)(whole), collapse_report(whole)
    for name in ("nc1", "cdnv", "nc2_equinorm_means", "nc2_etf_error", "num_directions"):
        np.testing.assert_allclose(getattr(split, name), getattr(want, name), rtol=1e-3, err_msg=name)


# Pseudo-inverses.


@jax.jit
def both_inverses(X):
    rows = Rows.of(X)
    return pseudo_inverse(rows), inverse_of_gram((), rows)


def graded_rows(k, m, rank, seed=0):
    """Rows of sizes from 1e-9 to 1, of a rank, in a random order."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(k, rank)) @ np.eye(m)[rng.permutation(m)[:rank]]
    return rng.permutation(np.geomspace(1e-9, 1, k))[:, None] * rows


@pytest.mark.parametrize(("k", "m", "rank"), [(4, 9, 4), (4, 9, 3), (6, 6, 6), (9, 4, 4), (9, 4, 3), (40, 4, 4)])
def test_pseudo_inverses_of_rows_of_very_different_sizes_are_those_of_float64(k, m, rank):
    X = graded_rows(k, m, rank).astype(np.float32)
    (got, of_gram), want = both_inverses(X), np.linalg.pinv(X.astype(float), rcond=1e-15)
    assert (got.rank, got.known) == (rank, 1)
    # Each column of X⁺ in a unit of its own. Its rows are not: where those of X have no digit, neither has it.
    units = np.linalg.norm(want, axis=0)[None, :]
    np.testing.assert_allclose(np.asarray(got.matrix, float) / units, want / units, atol=1e-4)
    # Of (XᵀX)⁺ each entry against those of the diagonal, but for features that no row has.
    has = np.any(X != 0, axis=0)
    of_gram = np.asarray(of_gram.matrix, float)
    units, want = np.linalg.norm(want, axis=1)[has], want @ want.T
    units = np.outer(units, units)
    np.testing.assert_allclose(of_gram[np.ix_(has, has)] / units, want[np.ix_(has, has)] / units, atol=1e-3)


@pytest.mark.parametrize(("k", "m", "rank"), [(4, 7, 4), (7, 4, 4), (5, 5, 3)])
def test_their_derivatives_are_those_of_finite_differences(k, m, rank):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(k, rank)), rng.normal(size=(rank, m))
    d_left, d_right = rng.normal(size=(k, rank)), rng.normal(size=(rank, m))

    @jax.jit
    def inverses(t):
        X = (left + t * d_left) @ (right + t * d_right)  # of one rank all along
        return [inverse.matrix for inverse in both_inverses(X)]

    slopes = jax.jit(lambda t: jax.jvp(inverses, (t,), (1.0,))[1])(0.0)
    backwards = jax.jit(jax.jacrev(lambda t: jnp.stack([jnp.sum(x**2) for x in inverses(t)])))(0.0)
    for at, after, before, slope, back in zip(*map(inverses, (0.0, 1e-6, -1e-6)), slopes, backwards, strict=True):
        want = (after - before) / 2e-6
        np.testing.assert_allclose(slope, want, rtol=1e-6, atol=1e-7 * np.max(np.abs(want)))
        np.testing.assert_allclose(back, 2 * np.sum(at * slope), rtol=1e-9)
