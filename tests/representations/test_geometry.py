"""Spectra that are known, and those of NumPy's covariance: at once, in batches, and from the covariance alone."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax import ClassMoments, representation_geometry
from flatjax.representations import FeatureSpectrum, geometry_of_covariance

from . import cases

M = 5
FIT = (1, 4)
SCALARS = ("rankme", "rankme_of_variances", "participation_ratio", "alpha_req", "alpha_req_r_squared")
measure = jax.jit(functools.partial(representation_geometry, fit_range=FIT))
updated = jax.jit(FeatureSpectrum.update)


def random_feats(leading=(4, 6), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    feats = rng.normal(size=(*leading, M)) * np.array([3, 2, 1, 0.5, 0.1]) @ rng.normal(size=(M, M)) + 2
    return feats.astype(dtype), rng.uniform(0.5, 2, leading).astype(dtype)


def streamed(batches, dtype=jnp.float64):
    spectrum = FeatureSpectrum.init(batches[0][0].shape[-1], dtype=dtype)
    for batch in batches:
        spectrum = updated(spectrum, *batch)
    return spectrum


def test_the_geometry_of_eigenvalues_one_over_i_is_known():
    variances = 1 / np.arange(1, 129)
    want = {
        "rankme": 107.048,
        "rankme_of_variances": 46.9525,
        "participation_ratio": 18.0308,
        "alpha_req": 1,
        "alpha_req_r_squared": 1,
    }
    feats = cases.feats_with(variances, 160, mean=3)
    for got in (representation_geometry(feats), geometry_of_covariance(np.diag(variances), 160)):
        cases.assert_geometry(got, want, rtol=1e-5)  # To the digits that are known.
        cases.assert_geometry(got, cases.geometry_of(variances, (11, 98)), rtol=1e-10)
        np.testing.assert_allclose(got.variances, variances, rtol=1e-9)
        assert (got.num_resolved, got.num_samples, got.is_rank_limited) == (128, 160, True)


@pytest.mark.parametrize("leading", [(4, 6), (9,), (3,)])
def test_the_geometry_is_that_of_the_dense_covariance(leading):
    feats, weights = random_feats(leading)
    resolved = min(M, np.prod(leading) - 1)
    fit = (1, min(4, resolved)) if resolved > 2 else None
    got = representation_geometry(feats, weights, **({"fit_range": fit} if fit else {}))
    variances = np.where(np.arange(M) < resolved, cases.covariance_spectrum(feats, weights), 0)
    cases.assert_geometry(got, cases.geometry_of(variances, fit), rtol=1e-12)
    np.testing.assert_allclose(got.variances, variances, rtol=1e-10, atol=1e-13)
    assert int(got.num_resolved) == resolved
    assert np.isnan(got.alpha_req) == (fit is None)


def test_the_unweighted_geometry_is_that_of_equal_weights():
    feats, _ = random_feats()
    want = cases.geometry_of(cases.covariance_spectrum(feats, np.ones(feats.shape[:-1])), FIT)
    cases.assert_geometry(measure(feats), want, rtol=1e-12)


@pytest.mark.parametrize("sizes", [[24], [1] * 24, [1, 3, 13, 7], [0, 20, 4]], ids=str)
def test_batches_in_any_order_give_the_geometry_of_all(sizes):
    feats, weights = (x.reshape(24, *x.shape[2:]) for x in random_feats())
    feats = feats + 1e3
    ends = np.cumsum(sizes)[:-1]
    batches = [b for b in zip(np.split(feats, ends), np.split(weights, ends), strict=True) if len(b[0])]
    want = measure(feats, weights)
    for order in (batches, batches[::-1]):
        spectrum = streamed(order)
        cases.assert_geometry(spectrum.geometry(fit_range=FIT), {x: getattr(want, x) for x in SCALARS}, rtol=1e-9)
        np.testing.assert_allclose(spectrum.mean.value, np.average(feats, axis=0, weights=weights), rtol=1e-13)
        assert spectrum.count == 24


def test_merged_spectra_are_of_the_samples_of_both():
    feats, weights = random_feats()
    parts = [streamed([(feats[i], weights[i])]) for i in range(4)]
    empty = FeatureSpectrum.init(M, dtype=jnp.float64)
    merged = functools.reduce(FeatureSpectrum.merge, [empty, parts[2], parts[0].merge(parts[3]), empty, parts[1]])
    want = measure(feats, weights)
    cases.assert_geometry(merged.geometry(fit_range=FIT), {x: getattr(want, x) for x in SCALARS}, rtol=1e-11)


def test_several_layers_are_measured_at_once_by_vmap():
    feats = np.stack([random_feats(seed=seed)[0] for seed in range(3)])

    @jax.jit
    def of_layers(feats):
        empty = jax.tree.map(lambda x: jnp.stack([x] * 3), FeatureSpectrum.init(M, dtype=jnp.float64))
        spectra = jax.vmap(FeatureSpectrum.update)(empty, feats)
        return jax.vmap(lambda spectrum: spectrum.geometry(fit_range=FIT))(spectra), jax.vmap(measure)(feats)

    geometry, at_once = of_layers(feats)
    for i, one in enumerate(feats):
        want = {x: getattr(measure(one), x) for x in SCALARS}
        for got in (geometry, at_once):
            cases.assert_geometry(jax.tree.map(lambda x, i=i: x[i], got), want, rtol=1e-11)


def test_float32_keeps_what_its_covariance_loses():
    variances = np.concatenate([[1e6], 10.0 ** -np.linspace(0, 4, 29)])
    feats = cases.feats_with(variances, 300, mean=30).astype(np.float32)
    want = cases.geometry_of(variances, (2, 30))
    options = {"fit_range": (2, 30)}
    whole = representation_geometry(feats, **options)
    spectrum = streamed([(x,) for x in np.split(feats, 5)], jnp.float32).geometry(**options)
    for got in (whole, spectrum):
        assert got.rankme.dtype == jnp.float32
        cases.assert_geometry(got, {"rankme": want["rankme"], "alpha_req": want["alpha_req"]}, rtol=2e-3)
        assert got.num_resolved == 30
    moments = ClassMoments.init(1, 30, covariance=True).update(feats, np.zeros(300, int))
    through_covariance = geometry_of_covariance(moments.covariance, moments.counts[0], **options)
    assert through_covariance.num_resolved < 20
    assert float(through_covariance.rankme) - 1 < 0.5 * (want["rankme"] - 1)
    assert np.isnan(through_covariance.alpha_req)


@pytest.mark.parametrize("scale", [1e-25, 1e17])
def test_the_geometry_does_not_depend_on_the_scale_however_small_its_square(scale):
    feats, weights = random_feats(dtype=np.float32)
    feats = feats - 2
    want = measure(feats, weights)
    got = measure((np.float32(scale) * feats).astype(np.float32), weights)
    cases.assert_geometry(got, {name: getattr(want, name) for name in SCALARS}, rtol=1e-4)


def test_the_geometry_is_invariant_to_rotation_shift_and_scale():
    feats, weights = random_feats()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(M, M)))[0]
    want = measure(feats, weights)
    got = measure(3 * feats @ rotation + 7, weights)
    cases.assert_geometry(got, {name: getattr(want, name) for name in SCALARS}, rtol=1e-11)


def test_the_conventions_are_in_order():
    got = measure(*random_feats())
    assert 1 < got.participation_ratio < got.rankme_of_variances < got.rankme < M


@jax.jit
@jax.jacrev
def gradients(feats, weights):
    return {name: getattr(measure(feats, weights), name) for name in SCALARS[:4]}


@pytest.mark.parametrize("name", SCALARS[:4])
def test_gradients_are_those_of_finite_differences(name):
    feats, weights = random_feats((9,))
    direction = np.random.default_rng(1).normal(size=feats.shape)

    def value(feats):
        return getattr(measure(feats, weights), name)

    gradient = gradients(feats, weights)[name]
    step = 1e-5
    want = (value(feats + step * direction) - value(feats - step * direction)) / (2 * step)
    np.testing.assert_allclose(np.sum(gradient * direction), want, rtol=1e-7)


def test_a_weight_of_zero_leaves_the_derivatives_in_the_others_as_they_are_without_its_sample():
    feats, weights = random_feats((9,))
    gradient = jax.grad(lambda weights: measure(feats, weights).rankme)
    got = gradient(jnp.asarray(weights).at[4].set(0))
    np.testing.assert_array_equal(got[4], 0)
    rest = np.arange(9) != 4
    want = jax.grad(lambda weights: measure(feats[rest], weights).rankme)(weights[rest])
    np.testing.assert_allclose(got[rest], want, rtol=1e-9, atol=1e-12)


def test_gradients_are_finite_where_there_are_fewer_samples_than_features():
    feats, _ = random_feats((4,))
    gradient = jax.grad(lambda feats: representation_geometry(feats).rankme)(feats)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient != 0)


def test_bfloat16_is_computed_on_in_float32():
    feats, weights = random_feats(dtype=jnp.bfloat16)
    wide = measure(feats.astype(np.float64), weights.astype(np.float64))
    want = {name: getattr(wide, name) for name in SCALARS}
    for got in (measure(feats, weights), streamed([(feats, weights)], jnp.float32).geometry(fit_range=FIT)):
        assert got.rankme.dtype == jnp.float32
        cases.assert_geometry(got, want, rtol=1e-5)


def test_samples_without_weight_count_for_nothing():
    feats, weights = random_feats((9,))
    want = measure(feats[:7], weights[:7])
    feats[7:], weights[7:] = np.nan, 0
    for got in (measure(feats, weights), streamed([(feats, weights)]).geometry(fit_range=FIT)):
        cases.assert_geometry(got, {name: getattr(want, name) for name in SCALARS}, rtol=1e-11)
        assert got.num_samples == 7


BAD = {
    "NaN": lambda feats, weights: feats.__setitem__((3, 1), np.nan),
    "infinity": lambda feats, weights: feats.__setitem__((3, 1), np.inf),
    "negative weight": lambda feats, weights: weights.__setitem__(3, -1),
    "infinite weight": lambda feats, weights: weights.__setitem__(3, np.inf),
    "no weight": lambda feats, weights: weights.__setitem__(slice(None), 0),
    "one sample": lambda feats, weights: weights.__setitem__(slice(1, None), 0),
    "no spread": lambda feats, weights: feats.__setitem__(slice(None), 0.5),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_and_no_spread_give_no_number(name):
    feats, weights = random_feats((9,))
    BAD[name](feats, weights)
    good = random_feats((6,), seed=1)
    results = [measure(feats, weights), streamed([(feats, weights)]).geometry(fit_range=FIT)]
    if name in ("NaN", "infinity", "negative weight", "infinite weight"):
        results.append(streamed([good, (feats, weights), good]).geometry(fit_range=FIT))
    for got in results:
        assert all(np.isnan(getattr(got, name)) for name in SCALARS)
        assert np.all(np.isnan(got.variances))


NUMBERS = (0.1, 1.0, 1 / 3, -7.3, 1e6 + 0.3, 1e15, 1e-15, 1e-30)


def all_geometries(feats):
    """At once, in batches, and from the covariance."""
    n = len(feats)
    moments = ClassMoments.init(1, feats.shape[1], covariance=True).update(feats, np.zeros(n, int))
    return [
        representation_geometry(feats, fit_range=FIT),
        streamed([(feats,)], jnp.float32).geometry(fit_range=FIT),
        streamed([(feats[: n // 2],), (feats[n // 2 :],)], jnp.float32).geometry(fit_range=FIT),
        geometry_of_covariance(moments.covariance, n, fit_range=(1, 3)),
    ]


def assert_no_geometry(got):
    assert all(np.isnan(getattr(got, name)) for name in SCALARS)
    assert np.all(np.isnan(got.variances))
    assert got.num_resolved == 0


@pytest.mark.parametrize("num_samples", [2, 10, 1001])
def test_samples_that_are_all_the_same_have_no_geometry(num_samples):
    columns = np.resize(np.asarray(NUMBERS, np.float32), M)
    for row in (columns, columns[::-1] * np.float32(1.7), np.full(M, 0.1, np.float32), np.zeros(M, np.float32)):
        for got in all_geometries(np.tile(row, (num_samples, 1))):
            assert_no_geometry(got)


@pytest.mark.parametrize("number", NUMBERS)
def test_what_differs_in_its_last_digit_alone_has_no_geometry(number):
    number = np.float32(number)
    feats = np.where(np.random.default_rng(0).random((40, M)) < 0.5, number, np.nextafter(number, np.float32(np.inf)))
    assert len(np.unique(feats)) == 2
    for got in all_geometries(feats)[:3]:
        assert_no_geometry(got)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e15])
@pytest.mark.parametrize("size", [1e-15, 1.0, 10.0])
def test_features_beside_constant_ones_have_the_geometry_of_their_own(offset, size):
    spread = np.random.default_rng(0).normal(size=(60, 2)) * [1, 0.2]
    unit = size * max(1, 1e-4 * abs(offset))
    feats = np.zeros((60, M), np.float32) + np.float32(0.1 * size)
    feats[:, [1, 3]] = (offset * size + unit * spread).astype(np.float32)
    rng = np.random.default_rng(1)
    feats[:, 4] = np.where(
        rng.random(60) < 0.5, np.float32(3 * size), np.nextafter(np.float32(3 * size), np.float32(9))
    )
    variances = np.concatenate([cases.covariance_spectrum(feats[:, [1, 3]].astype(float) / unit, np.ones(60)), [0] * 3])
    want = cases.geometry_of(variances)
    for got in all_geometries(feats)[:3]:
        cases.assert_geometry(got, want, rtol=1e-4)
        assert got.num_resolved == 2
        np.testing.assert_allclose(np.asarray(got.variances, float) / unit**2, variances, rtol=1e-4)


@pytest.mark.parametrize("covariance", [np.zeros((3, 3)), np.diag([1, -0.1, 1]), np.diag([1, np.nan, 1])], ids=str)
def test_what_is_no_covariance_gives_no_number(covariance):
    got = geometry_of_covariance(covariance, 100, fit_range=(1, 3))
    assert all(np.isnan(getattr(got, name)) for name in SCALARS)


def test_alpha_is_not_fitted_to_what_is_not_there():
    feats, weights = random_feats()
    assert np.isnan(representation_geometry(feats, weights).alpha_req)  # 5 features, and 98 wanted
    feats[..., 4] = feats[..., 3]
    assert np.isnan(representation_geometry(feats, weights, fit_range=(1, 5)).alpha_req)
    assert np.isfinite(measure(feats, weights).alpha_req)


@pytest.mark.parametrize(("num_samples", "limited"), [(49, True), (50, False)])
def test_fewer_than_ten_samples_a_feature_are_said_to_limit_the_rank(num_samples, limited):
    assert bool(measure(random_feats((num_samples,))[0]).is_rank_limited) == limited


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_samples_on_eight_devices_give_what_one_gives(axis_type):
    feats, weights = random_feats((96,))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    split = jax.device_put((feats, weights), NamedSharding(mesh, P("data")))
    want = {name: getattr(measure(feats, weights), name) for name in SCALARS}
    with jax.set_mesh(mesh):
        empty = jax.device_put(FeatureSpectrum.init(M, dtype=jnp.float64), NamedSharding(mesh, P()))
        spectrum = updated(updated(empty, *split), *split)
        results = measure(*split), spectrum.geometry(fit_range=FIT)
    for got in results:
        cases.assert_geometry(got, want, rtol=1e-11)
    if axis_type == AxisType.Auto:
        program = updated.lower(empty, *split).compile().as_text()
        gathered = [line for line in program.splitlines() if "all-gather" in line and "f64[96" in line]
        assert not gathered


def test_geometry_is_exported_for_every_platform():
    feats, weights = random_feats(dtype=np.float32)

    @jax.jit
    def both(feats, weights):
        spectrum = FeatureSpectrum.init(M).update(feats, weights)
        return representation_geometry(feats, weights), spectrum.geometry()

    assert jax.export.export(both, platforms=("cpu", "cuda", "tpu"))(feats, weights).platforms[2] == "tpu"


@pytest.mark.parametrize(
    ("feats", "options", "error", "match"),
    [
        (np.ones((3, M), int), {}, TypeError, "feats has dtype int64"),
        (np.float64(1.0), {}, ValueError, r"feats has shape \(\), wanted"),
        (np.ones((0, M)), {}, ValueError, "holds no sample"),
        (np.ones((3, M)), {"weights": np.ones(4)}, ValueError, r"weights has shape \(4,\), wanted \(3,\)"),
        (np.ones((3, M)), {"fit_range": (3, 4)}, ValueError, r"fit_range is \(3, 4\)"),
        (np.ones((3, M)), {"fit_range": (0, 4)}, ValueError, r"fit_range is \(0, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(feats, options, error, match):
    with helpers.raises(error, match):
        representation_geometry(feats, **options)


@pytest.mark.parametrize(
    ("run", "error", "match"),
    [
        (lambda: geometry_of_covariance(np.ones((2, 3)), 9), ValueError, r"covariance has shape \(2, 3\)"),
        (lambda: geometry_of_covariance(np.ones((2, 2), int), 9), TypeError, "covariance has dtype int64"),
        (lambda: FeatureSpectrum.init(0), ValueError, "num_features is 0"),
        (lambda: FeatureSpectrum.init(2, dtype=jnp.bfloat16), TypeError, "dtype is bfloat16"),
        (lambda: FeatureSpectrum.init(2).update(np.ones((4, 3), np.float32)), ValueError, "is of 2 features"),
        (lambda: FeatureSpectrum.init(2).update(np.ones((4, 2))), TypeError, "feats has dtype float64"),
        (lambda: FeatureSpectrum.init(2).merge(FeatureSpectrum.init(3)), ValueError, "2 and 3 features"),
    ],
)
def test_spectra_and_covariances_that_do_not_fit_are_refused(run, error, match):
    with helpers.raises(error, match):
        run()
