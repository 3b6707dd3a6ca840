"""Features of mixes against the rows of the classifier, in NumPy: a projection by least squares for every pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import name_of, raises
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax.collapse.mixing import mixup, mixup_geometry

measure = jax.jit(mixup_geometry, static_argnames="centred")
COUNTS = ("num_classes", "num_pairs", "num_parallel", "num_undefined")


def case(num_classes=5, m=7, n=48, seed=0):
    rng = np.random.default_rng(seed)
    labels, partners = rng.integers(0, num_classes, (2, n))
    weights = rng.uniform(0.5, 2, n)
    return rng.normal(size=(m, num_classes)), 1 + rng.normal(size=(n, m)), labels, partners, weights


def by_pairs(kernel, feats, labels, partners, weights, centred=False):
    """The two means by loops and least squares, and how many classes and pairs are in them."""
    rows = kernel.T.astype(np.float64)
    means = {}
    for i, j in itertools.combinations_with_replacement(range(len(rows)), 2):
        chosen = ((labels == i) & (partners == j) | (labels == j) & (partners == i)) & (weights != 0)
        if chosen.any():
            means[i, j] = np.average(feats[chosen].astype(np.float64), axis=0, weights=weights[chosen])
    if centred:
        rows = rows - rows.mean(axis=0)
        shift = np.mean([mean for (i, j), mean in means.items() if i == j], axis=0)
        means = {pair: mean - shift for pair, mean in means.items()}
    cosines, residuals = [], []
    for (i, j), mean in means.items():
        if i == j:
            cosines.append(rows[i] @ mean / np.linalg.norm(rows[i]) / np.linalg.norm(mean))
        else:
            span = rows[[i, j]].T
            rest = mean - span @ np.linalg.lstsq(span, mean, rcond=None)[0]
            residuals.append(np.linalg.norm(rest) / np.linalg.norm(mean))
    return np.mean(cosines), np.mean(residuals), len(cosines), len(residuals)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rtol", "sizes"),
    [
        *((np.float64, 1e-13, sizes) for sizes in [(5, 7, 48), (2, 1, 30), (9, 2, 30), (3, 4, 64)]),
        *((np.float32, 3e-6, sizes) for sizes in [(5, 7, 48), (2, 1, 30)]),
    ],
    ids=name_of,
)
def test_both_means_are_those_of_least_squares_onto_each_pair_of_rows(dtype, rtol, sizes, centred):
    kernel, feats, labels, partners, weights = case(*sizes)
    kernel, feats, weights = (x.astype(dtype) for x in (kernel, feats, weights))
    got = measure({"kernel": kernel}, feats, labels, partners, weights=weights, centred=centred)
    wanted = by_pairs(kernel, feats, labels, partners, weights, centred)
    assert got.same_class_cosine.dtype == dtype
    # of one feature, and of two rows less their mean, nothing is outside
    np.testing.assert_allclose(got[:2], wanted[:2], rtol=rtol, atol=4 * np.finfo(dtype).eps)
    assert (int(got.num_classes), int(got.num_pairs)) == wanted[2:]


def collapsed(labels, partners, rows, seed=0):
    """Features (n, m) as theory has them, of any mixing weight."""
    t = np.random.default_rng(seed).uniform(0.1, 0.9, (len(labels), 1))
    return t * rows[labels] + (1 - t) * rows[partners]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_in_the_span_of_their_two_rows_leave_nothing_outside(dtype):
    kernel, _, labels, partners, _ = case()
    feats = 30 * collapsed(labels, partners, kernel.T)
    got = measure({"kernel": kernel.astype(dtype)}, feats.astype(dtype), labels, partners)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(got.same_class_cosine, 1, rtol=2 * eps)
    assert got.cross_class_residual < 4 * eps


def test_a_feature_orthogonal_to_both_rows_is_all_outside_and_at_60_degrees_by_its_sine():
    head = {"kernel": np.eye(4)[:, :2]}
    feats = np.array([[0.0, 0, 3, 0], [0, 1, np.sqrt(3), 0], [5, 5, 0, 0]])
    for feature, wanted in zip(feats, (1, np.sqrt(3) / 2, 0), strict=True):
        got = measure(head, feature[None], np.array([0]), np.array([1]))
        np.testing.assert_allclose(got.cross_class_residual, wanted, rtol=1e-15)
        assert np.isnan(got.same_class_cosine)
        assert [int(getattr(got, name)) for name in COUNTS] == [0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nearly_parallel_rows_span_a_plane_and_parallel_ones_a_line(dtype):
    """The sine of the angle is 1e-4; what is in the plane but not along the rows is outside only of the line."""
    a, b = np.array([0.6, 0.8, 0, 0]), np.array([0, 0, 1.0, 0])
    feats, labels, partners = (a + b)[None].astype(dtype), np.array([0]), np.array([1])
    near = measure({"kernel": np.stack([a, 3 * (a + 1e-4 * b)], axis=1).astype(dtype)}, feats, labels, partners)
    assert near.cross_class_residual < 1e5 * np.finfo(dtype).eps
    assert int(near.num_parallel) == 0
    for other in (-3 * a, a * (1 + 1e-7), 0 * a):
        for rows in ([a, other], [other, a]):
            parallel = measure({"kernel": np.stack(rows, axis=1).astype(dtype)}, feats, labels, partners)
            np.testing.assert_allclose(parallel.cross_class_residual, np.sqrt(0.5), rtol=1e-6)
            assert [int(getattr(parallel, name)) for name in COUNTS] == [0, 1, 1, 0]
    nothing = measure({"kernel": np.zeros((4, 2), dtype)}, feats, labels, partners)
    np.testing.assert_allclose(nothing.cross_class_residual, 1, rtol=1e-6)


def test_what_has_no_direction_is_counted_and_in_no_mean():
    """Class 0 has a row of 0, mixes of class 1 cancel, those of 1 and 2 do too, and 2 and the pair (0, 2) are left."""
    head = {"kernel": np.eye(3)[:, [0, 1, 2]] * np.array([0, 1, 1])}
    feats = np.array([[1.0, 1, 1], [1, 2, 3], [-1, -2, -3], [4, 0, 1], [-4, 0, -1], [0, 3, 4], [0, 0, 2]])
    labels, partners = np.array([0, 1, 1, 1, 2, 2, 0]), np.array([0, 1, 1, 2, 1, 2, 2])
    got = measure(head, feats, labels, partners)
    assert [int(getattr(got, name)) for name in COUNTS] == [1, 1, 1, 3]
    np.testing.assert_allclose(got.same_class_cosine, 0.8, rtol=1e-15)
    assert float(got.cross_class_residual) == 0


def test_order_of_mixes_and_of_the_two_classes_and_units_change_nothing():
    kernel, feats, labels, partners, weights = case()
    wanted = measure({"kernel": kernel}, feats, labels, partners, weights=weights)
    order = np.random.default_rng(1).permutation(len(labels))
    swap = np.random.default_rng(2).random(len(labels)) < 0.5
    one, other = np.where(swap, partners, labels), np.where(swap, labels, partners)
    got = measure({"kernel": 1e150 * kernel}, 1e-120 * feats[order], one[order], other[order], weights=weights[order])
    np.testing.assert_allclose(got, wanted, rtol=1e-13)


def test_what_mixes_of_weight_zero_hold_changes_nothing():
    kernel, feats, labels, partners, weights = case()
    void = np.random.default_rng(3).random(len(labels)) < 0.3
    wanted = by_pairs(kernel, feats, labels, partners, np.where(void, 0, weights))
    feats = np.where(void[:, None], np.nan, feats)
    by_weight = measure(
        {"kernel": kernel}, feats, np.where(void, 99, labels), partners, weights=np.where(void, 0, weights)
    )
    by_label = measure({"kernel": kernel}, feats, np.where(void, -100, labels), partners, weights=weights)
    np.testing.assert_allclose(by_weight[:4], wanted, rtol=1e-13)
    np.testing.assert_allclose(by_label[:4], wanted, rtol=1e-13)


@pytest.mark.parametrize(
    "change",
    [
        lambda kernel, feats, labels, partners: (kernel, feats, labels, partners + 1),
        lambda kernel, feats, labels, partners: (kernel, feats, labels - 1, partners),
        lambda kernel, feats, labels, partners: (kernel, np.vstack([feats[0] * np.inf, feats[1:]]), labels, partners),
        lambda kernel, feats, labels, partners: (kernel * np.nan, feats, labels, partners),
    ],
    ids=["partner", "label", "feature", "head"],
)  # fmt: skip
def test_a_bad_value_leaves_no_mean_that_looks_like_one(change):
    kernel, feats, labels, partners = change(*case()[:4])
    assert np.all(np.isnan(measure({"kernel": kernel}, feats, labels, partners)[:2]))


@pytest.mark.parametrize("centred", [False, True])
def test_the_gradient_is_that_of_finite_differences(centred):
    kernel, feats, labels, partners, _ = case()
    rng = np.random.default_rng(5)
    along = rng.normal(size=kernel.shape), rng.normal(size=feats.shape)

    @jax.jit
    def values(kernel, feats):
        return jnp.stack(mixup_geometry({"kernel": kernel}, feats, labels, partners, centred=centred)[:2])

    _, got = jax.jvp(values, (kernel, feats), along)
    step = 1e-6
    ahead, behind = (values(kernel + s * along[0], feats + s * along[1]) for s in (step, -step))
    np.testing.assert_allclose(got, (ahead - behind) / (2 * step), rtol=1e-7)


def test_the_gradient_is_finite_where_nothing_is_left_outside():
    labels, partners = np.array([0, 1, 0, 2]), np.array([1, 1, 2, 2])
    feats = np.array([[1.0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])

    def both(kernel, feats):
        geometry = mixup_geometry({"kernel": kernel}, feats, labels, partners)
        return geometry.same_class_cosine + geometry.cross_class_residual

    gradients = jax.jit(jax.grad(both, argnums=(0, 1)))(np.eye(4)[:, :3], feats)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_mixes_split_among_devices_give_the_same(kind):
    kernel, feats, labels, partners, _ = case()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    split = jax.device_put((feats, labels, partners), NamedSharding(mesh, PartitionSpec("data")))
    wanted = measure({"kernel": kernel}, feats, labels, partners)
    np.testing.assert_allclose(measure({"kernel": kernel}, *split), wanted, rtol=1e-13)
    by_name = dict(zip(("feats", "labels", "partners"), split, strict=True))
    np.testing.assert_allclose(measure({"kernel": kernel}, **by_name), wanted, rtol=1e-13)


def test_a_mix_is_of_two_inputs_of_the_classes_it_says():
    """Inputs that say which they are: 10 for each class, the class before the comma."""
    labels = np.repeat(np.arange(4), 10)
    inputs = labels[:, None, None] + np.linspace(0, 0.5, 40)[:, None, None] * np.ones((1, 2, 3))
    t = np.linspace(0.1, 0.9, 40)
    mixes, ones, others = mixup(jax.random.key(0), inputs, labels, t)
    assert np.array_equal(ones, labels)
    assert np.array_equal(np.sort(others), labels)
    assert not np.array_equal(others, labels)
    other_inputs = (np.asarray(mixes) - t[:, None, None] * inputs) / (1 - t)[:, None, None]
    assert np.array_equal(np.floor(other_inputs[:, 1, 2] + 1e-9), others)
    pixels = (inputs * 50).astype(np.uint8)
    halves, _, partners = mixup(jax.random.key(0), pixels, labels, 0.5)
    assert halves.dtype == jnp.float32
    assert np.array_equal(partners, others)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"partners": np.zeros(3, int)}, ValueError, r"partners has shape \(3,\), wanted \(48,\), one class a mix"),
        ({"partners": np.zeros(48)}, TypeError, "partners has dtype float64, wanted integer classes"),
        ({"labels": np.zeros(48)}, TypeError, "labels has dtype float64"),
        ({"feats": np.zeros((48, 6))}, ValueError, "the head takes 7 features"),
    ],
    ids=["shape", "dtype", "labels", "features"],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    kernel, feats, labels, partners, _ = case()
    arguments = {"params": {"kernel": kernel}, "feats": feats, "labels": labels, "partners": partners} | changes
    with raises(error, message):
        mixup_geometry(*arguments.values())
