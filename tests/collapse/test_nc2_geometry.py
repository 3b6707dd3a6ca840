"""At the simplex equiangular tight frame every metric is 0, and with too few features the floor is the minimum."""

import jax
import numpy as np
import pytest

from flatjax.collapse import etf_error

from .cases import (
    FEW_CLASSES,
    FILLED,
    MANY_CLASSES,
    METRICS,
    ONE_FEATURE,
    TWO_CLASSES,
    assert_close,
    collapsed_case,
    measure,
    moments_of,
    simplex,
)

ZERO = dict.fromkeys(METRICS, 0.0)
# Squares, which are rounded to ε².
SQUARED = ("nc1", "nc3", "cdnv", "ncc")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids=str)
@pytest.mark.parametrize(
    ("counts", "num_features"), [FEW_CLASSES, FILLED, TWO_CLASSES], ids=["C < m", "C = m + 1", "C = 2"]
)
def test_every_metric_of_a_simplex_frame_that_is_its_own_classifier_is_zero(counts, num_features, scale, dtype):
    case = collapsed_case(simplex(len(counts), num_features), counts)
    # The head may be of another size than the means.
    case = case._replace(feats=scale * case.feats).astype(dtype)
    eps = np.finfo(dtype).eps
    actual = measure(case)
    assert_close(actual, ZERO, rtol=0, atol=4 * eps, names=set(METRICS) - set(SQUARED))
    assert_close(actual, ZERO, rtol=0, atol=(8 * eps) ** 2, names=SQUARED)


@pytest.mark.parametrize(
    "name", ["nc1", "nc2_equinorm_means", "nc2_equiangularity_means", "nc2_cosine_std_means", "nc2_etf_error", "cdnv"]
)
def test_a_frame_pushed_off_the_simplex_is_not_collapsed(name):
    case = collapsed_case(simplex(4, 9), FEW_CLASSES[0])
    pushed = case.feats + 0.1 * np.random.default_rng(1).normal(size=case.feats.shape)
    assert getattr(measure(case._replace(feats=pushed)), name) > 1e-3


@pytest.mark.parametrize("factor", [-1.0, 2.0, 1e3], ids=str)
def test_duality_is_of_directions_and_angles_are_of_either_sign(factor):
    case = collapsed_case(simplex(4, 9), FEW_CLASSES[0])
    actual = measure(case._replace(kernel=factor * case.kernel))
    # ‖u − v‖² is 4 where v = −u.
    assert float(actual.nc3) == pytest.approx(0 if factor > 0 else 4, abs=1e-14)
    assert_close(actual, ZERO, rtol=0, atol=1e-14, names=[name for name in METRICS if name.startswith("nc2")])


def etf_error_of(means):
    labels = np.repeat(np.arange(len(means)), 2)
    return etf_error(moments_of(means[labels], labels, None, len(means)))


@pytest.mark.parametrize(("num_classes", "num_features"), [(6, 4), (9, 2)])
def test_the_etf_floor_is_attained_by_a_projection_of_the_simplex_and_undercut_by_no_frame(num_classes, num_features):
    # The Gram matrix of the simplex is a projection: any m of its C − 1 top eigenvectors make an optimal frame.
    optimum = simplex(num_classes, num_classes - 1)[:, :num_features]
    rng = np.random.default_rng(0)
    anywhere = rng.normal(size=(500, num_classes, num_features))
    nearby = optimum + 10 ** rng.uniform(-6, -0.5, (500, 1, 1)) * anywhere
    errors = np.asarray(jax.jit(jax.vmap(etf_error_of))(np.concatenate([optimum[None], anywhere, nearby])))

    floor = np.sqrt(2 - 2 * np.sqrt(num_features / (num_classes - 1)))
    assert errors[0] == pytest.approx(floor, rel=1e-14)
    assert np.min(errors) > floor * (1 - 1e-14)
    assert np.median(errors[1:501]) > 1.01 * floor


@pytest.mark.parametrize(
    ("counts", "num_features", "floor"),
    [(MANY_CLASSES[0], 4, np.sqrt(2 - 2 * np.sqrt(4 / 5))), ((10, 6, 9, 5, 0, 0), 4, 0), (FEW_CLASSES[0], 9, 0)],
    ids=["too few features", "enough for the classes with samples", "enough"],
)
def test_the_etf_floor_is_that_of_the_classes_with_samples(counts, num_features, floor):
    case = collapsed_case(np.random.default_rng(0).normal(size=(len(counts), num_features)), counts)
    assert float(measure(case).nc2_etf_floor) == pytest.approx(floor, rel=1e-14)


def test_with_one_feature_any_means_are_at_the_etf_floor():
    # The Gram matrix has one direction, of which all are as far from a simplex.
    actual = measure(collapsed_case(np.random.default_rng(0).normal(size=(4, 1)), ONE_FEATURE[0]))
    assert float(actual.nc2_etf_floor) == pytest.approx(np.sqrt(2 - 2 * np.sqrt(1 / 3)), rel=1e-14)
    assert float(actual.nc2_etf_error) == pytest.approx(float(actual.nc2_etf_floor), rel=1e-14)


def test_means_at_the_grand_mean_count_in_the_equinorm():
    # Of as many samples each, so that no rounding moves them.
    actual = measure(collapsed_case(np.eye(1, 9) * np.array([[-1], [0], [0], [1]]), (6, 6, 6, 6)))
    # Norms 1, 0, 0, 1: deviation √(1/3), mean 1/2.
    assert float(actual.nc2_equinorm_means) == pytest.approx(2 / np.sqrt(3), rel=1e-15)
