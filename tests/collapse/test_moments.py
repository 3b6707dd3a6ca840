"""Moments of a stream are those of all its samples at once, in whatever batches, orders and parts they come."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from flatjax.collapse import ClassMoments

C, M = 5, 3
update = jax.jit(ClassMoments.update)
merge = jax.jit(ClassMoments.merge)


def stream(n, *, spread=0.5, seed=0, dtype="float32"):
    """Labelled features of all classes but the last, around means of order 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C - 1, n)
    feats = rng.normal(size=(C, M))[labels] + spread * rng.normal(size=(n, M))
    return feats.astype(dtype), labels, rng.uniform(0.5, 2, n).astype(dtype)


def of_stream(feats, labels, weights, batch_size, *, dtype=jnp.float32, covariance=True):
    moments = ClassMoments.init(C, M, covariance=covariance, dtype=dtype)
    for start in range(0, len(feats), batch_size):
        batch = slice(start, start + batch_size)
        moments = update(moments, feats[batch], labels[batch], weights[batch])
    return moments


def dense(feats, labels, weights, num_classes=C):
    """Counts, masses, means, variances and covariance in float64, class by class."""
    feats, weights = feats.astype(np.float64), weights.astype(np.float64)
    counts, masses = (np.zeros(num_classes) for _ in range(2))
    means, variances = np.zeros((num_classes, feats.shape[1])), np.zeros(num_classes)
    products = np.zeros((feats.shape[1], feats.shape[1]))
    for c in range(num_classes):
        own = (labels == c) & (weights != 0)
        counts[c], masses[c] = own.sum(), weights[own].sum()
        if own.any():
            means[c] = np.average(feats[own], axis=0, weights=weights[own])
            residuals = feats[own] - means[c]
            variances[c] = np.average(np.sum(residuals**2, axis=1), weights=weights[own])
            products += (residuals.T * weights[own]) @ residuals
    return counts, masses, means, variances, products / masses.sum()


def assert_moments(moments, wanted, rtol):
    counts, masses, means, variances, covariance = wanted
    np.testing.assert_array_equal(moments.counts, counts)
    np.testing.assert_allclose(moments.masses, masses, rtol=rtol)
    np.testing.assert_allclose(moments.means, means, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(moments.variances, variances, rtol=rtol)
    if moments.product_sums is not None:
        np.testing.assert_allclose(moments.covariance, covariance, rtol=rtol, atol=rtol * np.max(covariance))


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-6), ("float64", 2e-14)])
@pytest.mark.parametrize("batch_size", [1, 7, 60], ids="batches of {}".format)
def test_moments_of_a_stream_are_those_of_all_its_samples(batch_size, dtype, rtol):
    samples = stream(60, dtype=dtype)  # the last batch is ragged
    assert_moments(of_stream(*samples, batch_size, dtype=dtype), dense(*samples), rtol)


@pytest.mark.parametrize("batch_size", [1, 30, 3000], ids="batches of {}".format)
@pytest.mark.parametrize("offset", [0, 4])
def test_a_variance_of_1e_12_of_the_squared_distances_is_right_to_1e_3_in_float32(batch_size, offset):
    # The standard deviation, 1e-6, is 8 units in the last place of the features: as float32 they are what is measured.
    n = min(3000, 300 * batch_size)
    feats, labels, weights = stream(n, spread=1e-6)
    samples = feats + np.float32(offset), labels, weights
    moments = of_stream(*samples, batch_size)
    _, _, _, variances, covariance = dense(*samples)
    np.testing.assert_allclose(moments.variances, variances, rtol=2e-6)
    np.testing.assert_allclose(moments.covariance, covariance, atol=2e-6 * np.max(covariance))


@pytest.mark.parametrize("order", ["left", "right", "tree", "shuffled"])
def test_the_order_in_which_moments_are_merged_does_not_matter_in_float32(order):
    samples = stream(2400, spread=1e-6)
    parts = [of_stream(*(x[i::8] for x in samples), 30) for i in range(8)]
    match order:
        case "left":
            merged = functools.reduce(merge, parts)
        case "right":
            merged = functools.reduce(lambda done, part: merge(part, done), parts[::-1])
        case "tree":
            while len(parts) > 1:
                parts = [merge(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
            (merged,) = parts
        case "shuffled":
            merged = functools.reduce(merge, (parts[i] for i in (5, 2, 7, 0, 4, 6, 1, 3)))
    assert_moments(merged, dense(*samples), 2e-6)


@pytest.mark.parametrize("num_devices", [3, 8])
def test_devices_have_together_the_moments_of_all_samples(num_devices):
    samples = stream(3000, spread=1e-6)
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P())
    def of_all(*samples):
        return ClassMoments.init(C, M, covariance=True).update(*samples).across("data")

    together = of_all(*samples)
    assert_moments(together, dense(*samples), 4e-6)
    assert int(together.num_bad) == 0


def test_pmap_has_an_axis_too():
    samples = stream(80)
    of_all = jax.pmap(lambda *samples: ClassMoments.init(C, M).update(*samples).across("data"), axis_name="data")
    everywhere = of_all(*(x.reshape(8, 10, *x.shape[1:]) for x in samples))
    for device in (0, 7):
        assert_moments(jax.tree.map(operator.itemgetter(device), everywhere), dense(*samples), 2e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_moments_split_among_devices_by_classes_stay_split_and_are_the_same(axis_type):
    feats, labels, weights = stream(64)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    by_class, whole = NamedSharding(mesh, P("model")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        empty = ClassMoments.init(8, M, covariance=True)
        shardings = jax.tree.map(lambda x: by_class if x.shape[:1] == (8,) else whole, empty)
        placed = jax.device_put(empty, shardings)
        by_sample = NamedSharding(mesh, P("data"))
        moments = update(placed, *(jax.device_put(x, by_sample) for x in (feats, labels, weights)))
        both = merge(moments, moments)
    # The compiler may forget shardings that are not of the type.
    if axis_type == AxisType.Explicit:
        assert jax.tree.map(jax.typeof, both) == jax.tree.map(jax.typeof, placed)
    assert_moments(moments, dense(feats, labels, weights, 8), 2e-6)
    twice = (np.concatenate([x, x]) for x in (feats, labels, weights))
    assert_moments(both, dense(*twice, 8), 2e-6)


def test_padding_counts_nowhere_whatever_it_holds():
    feats, labels, weights = stream(60)
    void = np.random.default_rng(1).random(60) < 0.4
    dropped, ignored = void & (np.arange(60) % 2 == 0), void & (np.arange(60) % 2 == 1)
    garbage = np.where(void[:, None], np.array([np.nan, np.inf, 1e38], np.float32), feats)
    given = garbage, np.where(ignored, -100, np.where(dropped, 77, labels)), np.where(dropped, 0, weights)
    assert_moments(of_stream(*given, 60), dense(feats[~void], labels[~void], weights[~void]), 2e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("labels", C), ("labels", -1), ("feats", np.nan), ("feats", -np.inf), ("feats", 1e30)],
        *[("weights", -1.0), ("weights", np.nan), ("weights", np.inf)],
    ],
)
def test_a_bad_sample_makes_all_means_and_variances_nan_and_is_counted(name, value):
    samples = dict(zip(("feats", "labels", "weights"), stream(60), strict=True))
    samples[name] = samples[name].copy()
    samples[name][13] = value
    moments = merge(of_stream(**samples, batch_size=60), of_stream(*stream(60), 60))
    assert int(moments.num_bad) == 1
    for values in (moments.masses, moments.means, moments.variances, moments.covariance):
        assert np.all(np.isnan(values))


def test_a_batch_of_padding_or_of_nothing_changes_nothing():
    feats, labels, weights = stream(30)
    moments = of_stream(feats, labels, weights, 30)
    for after in (update(moments, feats, labels, 0 * weights), moments.update(feats[:0], labels[:0])):
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(moments), strict=True):
            np.testing.assert_array_equal(x, y)


def test_weights_are_summed_beyond_the_integers_of_float32():
    ones, zeros = np.ones((1, M), np.float32), np.zeros(1, int)
    moments = update(ClassMoments.init(C, M), ones, zeros, np.array([2.0**24], np.float32))
    for _ in range(5):
        moments = update(moments, 2 * ones, zeros, np.ones(1, np.float32))
    # In float32, 2²⁴ + 1 = 2²⁴.
    assert moments.mass_sums.high.astype(float)[0] + moments.mass_sums.low.astype(float)[0] == 2**24 + 5
    np.testing.assert_allclose(moments.square_sums.value[0], M * 5 * 2**24 / (2**24 + 5), rtol=1e-6)


def test_a_count_stays_at_the_largest_there_is():
    moments = of_stream(*stream(40), 40, covariance=False)
    full = moments._replace(counts=jnp.full(C, 2**31 - 2, jnp.int32))
    assert merge(full, moments).counts.tolist() == [2**31 - 1] * 4 + [2**31 - 2]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    across = jax.shard_map(lambda x: x.across("data"), mesh=mesh, in_specs=P(), out_specs=P())
    assert jax.jit(across)(full).counts.tolist() == [2**31 - 1] * C


def test_more_classes_than_memory_for_a_product_with_one_hot_labels():
    num_classes = 2**20 + 1
    labels = np.array([0, 2**20, 5, 2**20])
    moments = update(ClassMoments.init(num_classes, 1), np.arange(4.0, dtype=np.float32)[:, None], labels)
    assert moments.counts[labels].tolist() == [1, 2, 1, 2]
    assert moments.means[labels, 0].tolist() == [0, 2, 2, 2]
    assert moments.variances[labels].tolist() == [0, 1, 0, 1]


def test_an_update_in_place_needs_memory_of_the_size_of_the_batch_alone():
    num_classes, num_features, n = 20_000, 64, 32
    moments = jax.eval_shape(lambda: ClassMoments.init(num_classes, num_features))
    arguments = moments, np.zeros((n, num_features), np.float32), np.zeros(n, int)
    compiled = jax.jit(ClassMoments.update, donate_argnums=0).lower(*arguments).compile()
    sizes = compiled.memory_analysis()
    assert sizes.alias_size_in_bytes > 2 * 4 * num_classes * num_features
    assert sizes.temp_size_in_bytes < 40 * 4 * n * num_features


class OnlyDLPack:
    """An array of another library."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray, OnlyDLPack])
def test_batches_are_of_numpy_jax_or_dlpack(convert):
    samples = stream(40)
    moments = ClassMoments.init(C, M).update(*map(convert, samples))
    assert_moments(moments, dense(*samples), 2e-6)


def test_leading_shapes_are_flattened_and_weights_may_be_integers():
    feats, labels, _ = stream(40)
    weights = np.arange(40) % 3
    shaped = feats.reshape(2, 5, 4, M), labels.reshape(2, 5, 4), weights.reshape(2, 5, 4)
    moments = update(ClassMoments.init(C, M), *shaped)
    assert_moments(moments, dense(feats, labels, weights), 2e-6)


@pytest.mark.parametrize(("dtype", "num_classes"), [("int8", 128), ("uint8", 256), ("uint8", 300), ("uint64", 5)])
def test_any_integer_dtype_holds_labels_also_where_it_does_not_hold_their_number(dtype, num_classes):
    feats, labels, weights = stream(40)
    labels = labels * (num_classes // 4) - 1 + (labels == 0)
    moments = ClassMoments.init(num_classes, M).update(feats, labels.astype(dtype), weights)
    assert_moments(moments, dense(feats, labels, weights, num_classes), 2e-6)


def test_a_label_that_would_be_padding_in_32_bits_is_out_of_range():
    feats, labels, weights = stream(40)
    labels[3] = 2**32 - 100
    assert int(update(ClassMoments.init(C, M), feats, labels, weights).num_bad) == 1


@pytest.mark.parametrize("label", [-(2**63), -(2**32), 2**32 + 1, 2**32 - 100, 2**64 - 1])
def test_a_label_that_would_be_a_class_or_padding_in_32_bits_is_out_of_range_without_x64(label):
    feats, labels, weights = stream(40)
    labels = labels.astype("int64" if label < 2**63 else "uint64")
    labels[3] = label
    with jax.enable_x64(False):
        moments = ClassMoments.init(C, M)
        assert int(moments.update(feats, labels, weights).num_bad) == 1
        assert int(moments.update(feats[3], labels[3]).num_bad) == 1


def test_bfloat16_counts_as_the_float32_values_it_is():
    feats, labels, weights = stream(40)
    feats = feats.astype(jnp.bfloat16)
    assert_moments(of_stream(feats, labels, weights, 20), dense(feats, labels, weights), 2e-6)


def test_moments_of_every_layer_are_taken_by_vmap():
    samples = [stream(30, seed=seed) for seed in range(3)]
    feats = np.stack([x[0] for x in samples])
    labels, weights = samples[0][1:]
    empty = jax.tree.map(lambda x: jnp.stack([x] * 3), ClassMoments.init(C, M, covariance=True))
    by_layer = jax.jit(jax.vmap(ClassMoments.update, in_axes=(0, 0, None, None)))(empty, feats, labels, weights)
    for layer in range(3):
        one = jax.tree.map(operator.itemgetter(layer), by_layer)
        assert_moments(one, dense(feats[layer], labels, weights), 2e-6)


def test_a_stream_is_scanned_with_the_moments_as_its_state():
    samples = stream(60)
    batches = tuple(x.reshape(6, 10, *x.shape[1:]) for x in samples)
    empty = ClassMoments.init(C, M, covariance=True)
    moments, _ = jax.lax.scan(lambda moments, batch: (moments.update(*batch), None), empty, batches)
    assert_moments(moments, dense(*samples), 2e-6)


def test_gradients_of_the_moments_are_finite_differences():
    feats, labels, weights = stream(20, dtype="float64")
    before = of_stream(*stream(60, seed=1, dtype="float64"), 60, dtype="float64")
    along = np.random.default_rng(2).normal(size=feats.shape)

    @jax.jit
    def functional(feats):
        after = before.update(feats, labels, weights)
        return jnp.sum(after.variances**2) + jnp.sum(jnp.sin(after.means)) + jnp.sum(after.covariance[0])

    step = 1e-5
    wanted = (functional(feats + step * along) - functional(feats - step * along)) / (2 * step)
    np.testing.assert_allclose(np.sum(jax.jit(jax.grad(functional))(feats) * along), wanted, rtol=1e-8)


def test_moments_survive_a_checkpoint(tmp_path):
    moments = of_stream(*stream(60), 7)
    ocp.save(tmp_path / "moments", moments)
    restored = ocp.load(tmp_path / "moments", jax.tree.map(jnp.zeros_like, moments))
    assert isinstance(restored, ClassMoments)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(moments), strict=True):
        np.testing.assert_array_equal(x, y)
    samples = [np.concatenate(pair) for pair in zip(stream(60), stream(30, seed=1), strict=True)]
    assert_moments(update(restored, *stream(30, seed=1)), dense(*samples), 2e-6)


def test_moments_are_not_changed_by_what_is_made_of_them():
    moments = of_stream(*stream(60), 60)
    before = jax.tree.map(np.array, moments)
    moments.update(*stream(30, seed=1))
    moments.merge(moments)
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(moments), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(AttributeError):
        moments.counts = moments.counts


FEATS, LABELS, WEIGHTS = stream(10)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((FEATS[:, :2], LABELS), ValueError, r"feats has shape \(10, 2\), but the moments are of 3 features"),
        ((FEATS, LABELS[:4]), ValueError, r"labels has dtype int64 and shape \(4,\), wanted integers of shape \(10,\)"),
        ((FEATS, 1.0 * LABELS), TypeError, "labels has dtype float64"),
        ((FEATS, LABELS > 0), TypeError, "labels has dtype bool"),
        ((FEATS.astype(int), LABELS), TypeError, "feats has dtype int64, wanted a floating dtype"),
        ((FEATS.astype(float), LABELS), TypeError, "feats has dtype float64, but the moments are float32"),
        ((FEATS, LABELS, WEIGHTS[:3]), ValueError, r"weights has shape \(3,\), wanted \(10,\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_batch_that_does_not_fit_is_refused(batch, error, message):
    with raises(error, message):
        ClassMoments.init(C, M).update(*batch)


def test_moments_that_do_not_fit_each_other_are_not_merged():
    moments = ClassMoments.init(C, M)
    for other in (ClassMoments.init(C + 1, M), ClassMoments.init(C, M + 1), ClassMoments.init(C, M, covariance=True)):
        with raises(ValueError, "moments of 5 classes and 3 features, covariance False, cannot be merged"):
            moments.merge(other)
    with raises(ValueError, "got 0 classes of 3 features"):
        ClassMoments.init(0, M)
    with raises(TypeError, "dtype is bfloat16"):
        ClassMoments.init(C, M, dtype=jnp.bfloat16)
    with raises(ValueError, "the moments have no covariance"):
        _ = moments.covariance
