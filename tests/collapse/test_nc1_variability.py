"""NC1, CDNV and NCC where the spread is tiny, where means are close, and where they are one."""

import itertools

import jax
import numpy as np
import pytest

from flatjax.collapse import cdnv, ncc

from .cases import (
    FEW_CLASSES,
    MANY_CLASSES,
    SHAPES,
    TWO_CLASSES,
    Case,
    assert_close,
    expected,
    measure,
    moments_of,
    random_case,
)

VARIABILITY = ("nc1", "cdnv", "ncc")
OF_MEANS = ("nc2_equinorm_means", "nc2_equiangularity_means", "nc2_cosine_std_means", "nc2_etf_error", "nc3", "nc4")
EPS = float(np.finfo("float32").eps)


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), TWO_CLASSES], ids=[*SHAPES, "two classes"])
def test_a_spread_of_1e_6_of_the_distances_is_measured_in_float32(shape, offset):
    case = random_case(*shape, spread=1e-6)._replace(weights=np.ones(sum(shape[0])))
    # float32 rounds the spread itself: the oracle is given the rounded features.
    case = case._replace(feats=case.feats + offset).astype("float32")
    wanted = expected(case)
    assert_close(measure(case), wanted, rtol=1e-5, atol=0, names=VARIABILITY)
    # E[x²] − E[x]² has no digit of it: this test bites.
    assert abs(textbook_cdnv(case) / wanted["cdnv"] - 1) > 0.5


def textbook_cdnv(case: Case) -> float:
    """CDNV with V_c = E‖x‖² − ‖E x‖², in the dtype of the features."""
    classes = [case.feats[case.labels == c] for c in np.unique(case.labels)]
    means = [feats.mean(axis=0) for feats in classes]
    variances = [(feats**2).sum(axis=1).mean() - (mean**2).sum() for feats, mean in zip(classes, means, strict=True)]
    pairs = itertools.permutations(range(len(means)), 2)
    return np.mean([(variances[c] + variances[k]) / (2 * ((means[c] - means[k]) ** 2).sum()) for c, k in pairs])


@pytest.mark.parametrize("offset", [10.0, 1e2, 1e4], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), TWO_CLASSES], ids=[*SHAPES, "two classes"])
def test_a_common_offset_costs_no_digit_but_those_it_rounds_away(shape, offset):
    case = random_case(*shape).astype("float32")
    # 1e4 rounds the features to 1e-3; the oracle is given what is left of them.
    case = case._replace(feats=case.feats + np.float32(offset))
    assert_close(measure(case), expected(case), rtol=8e-6, atol=4e-7, names=VARIABILITY + OF_MEANS)


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3], ids=str)
def test_two_means_much_closer_than_the_others_are_told_apart_in_float32(distance):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 9))
    means[1] = means[0] + distance * means[1] / np.linalg.norm(means[1])
    labels = np.repeat(np.arange(4), FEW_CLASSES[0])
    feats = means[labels] + 0.1 * distance * rng.normal(size=(24, 9))
    case = Case(means.T, np.zeros(4), feats, labels, np.ones(24)).astype("float32")
    # Means of order 1 are rounded to ε, their distance to ε/distance of itself, its square to twice that. As a
    # difference of squares it would be rounded to ε/distance².
    assert_close(measure(case), expected(case), rtol=4 * EPS / distance, atol=0, names=("cdnv", "ncc"))


def test_cdnv_is_of_ordered_pairs_of_different_kept_classes():
    case = random_case((9, 0, 8, 1, 11, 1), 4)

    @jax.jit
    def of_pairs(feats, labels):
        moments = moments_of(feats, labels, None, 6)
        return ncc(moments), cdnv(moments)

    wanted = 0
    for c, k in itertools.permutations((0, 2, 4), 2):
        x, y = case.feats[case.labels == c], case.feats[case.labels == k]
        spread = x.var(axis=0).sum() + y.var(axis=0).sum()
        wanted += spread / (2 * np.sum((x.mean(axis=0) - y.mean(axis=0)) ** 2))
    np.testing.assert_allclose(of_pairs(case.feats, case.labels), [wanted, wanted / 6], rtol=1e-13)


def test_nc1_is_the_same_in_any_basis_of_what_the_means_span():
    # tr(Σ_W Σ_B⁻¹), unlike a ratio of traces or CDNV.
    case = random_case(*MANY_CLASSES)
    mapped = measure(case._replace(feats=case.feats @ np.random.default_rng(2).normal(size=(4, 4))))
    assert_close(mapped, measure(case), rtol=1e-11, atol=0, names=["nc1"])
    assert abs(mapped.cdnv / measure(case).cdnv - 1) > 0.1


def test_nc1_weighs_classes_by_their_samples_and_cdnv_does_not():
    case = random_case(*FEW_CLASSES)
    # Class 0 is wider than the others. With more weight it has the same mean and variance.
    case = case._replace(feats=np.where((case.labels == 0)[:, None], 3 * case.feats, case.feats))
    heavier = case._replace(weights=np.where(case.labels == 0, 2, 1) * case.weights)
    assert_close(measure(heavier), measure(case), rtol=1e-12, atol=0, names=("cdnv", "ncc"))
    assert measure(heavier).nc1 > 1.1 * measure(case).nc1


def symmetric_case(means, spread, rng, dtype):
    """Classes exactly around `means`: two pairs of samples that mirror each other, and one sample there."""
    half = spread * rng.integers(-4, 5, (len(means), 2, means.shape[1]))
    feats = means[:, None] + np.concatenate([half, -half, 0 * half[:, :1]], axis=1)
    order = rng.permutation(5 * len(means))
    labels = np.repeat(np.arange(len(means)), 5)[order]
    feats = feats.reshape(-1, means.shape[1])[order]
    return Case(rng.normal(size=means.T.shape), np.zeros(len(means)), feats, labels, np.ones(len(feats))).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [0, 2.0**-21, 2.0**-3], ids=str)
def test_classes_that_all_have_one_mean_never_look_collapsed(spread, dtype):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        # All numbers here are multiples of 2⁻²¹ below 2: none is rounded.
        case = symmetric_case(np.tile(rng.integers(64, 128, 4) / 64, (6, 1)), spread, rng, dtype)
        if spread == 0:  # of equal features any weights have the same mean
            case = case._replace(weights=rng.uniform(0.5, 2, 30))
        assert_never_collapsed(case, VARIABILITY, seed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spread", [2.0**-21, 2.0**-10], ids=str)
def test_two_classes_of_several_that_have_one_mean_never_look_collapsed(spread, dtype):
    for seed in range(50):
        rng = np.random.default_rng(seed)
        means = rng.integers(-128, 128, (6, 4)) / 64
        means[3] = means[1]
        assert_never_collapsed(symmetric_case(means, spread, rng, dtype), ("cdnv", "ncc"), seed)


def assert_never_collapsed(case, names, seed):
    actual = measure(case)
    for name in names:
        value = float(getattr(actual, name))
        # 0/0 or V/0. Should a 0 be rounded, it is to ε of the spread, and these are 1/ε² or more.
        assert not np.isfinite(value) or value > 1e10, (name, seed, value)


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_two_close_means_are_told_apart_by_nc1_and_nc4_in_float32(distance):
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 9))
    means[1] = means[0] + distance * rng.normal(size=9)
    labels = np.repeat(np.arange(4), 25)
    feats = means[labels] + 0.03 * distance * rng.normal(size=(100, 9))
    feats -= means[0]  # where float32 resolves the two
    case = Case(feats=feats, labels=labels, kernel=means.T, bias=-0.5 * np.sum(means**2, axis=1), weights=np.ones(100))
    narrow = case.astype("float32")
    centred = np.stack([np.mean(narrow.feats[labels == c].astype(float), axis=0) for c in range(4)])
    residuals = narrow.feats - centred[labels]
    coordinates = residuals @ np.linalg.pinv(centred - centred.mean(axis=0), rcond=1e-13)
    actual = measure(narrow)
    np.testing.assert_allclose(actual.nc1, np.mean(np.sum(coordinates**2, axis=1)), rtol=0.02)
    squares = np.sum((narrow.feats[:, None] - centred[None]) ** 2, axis=-1)
    disagreement = np.mean(np.argmin(squares, axis=1) != np.argmax(narrow.feats @ narrow.kernel + narrow.bias, axis=1))
    np.testing.assert_allclose(actual.nc4, disagreement, atol=1e-6)
