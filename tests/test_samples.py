"""Samples of any leading shape become one list; bad ones are marked."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.heads import LinearHead, linear_head
from flatjax.samples import Samples, flatten_samples, mark_class_labels

HEAD = linear_head({"kernel": np.ones((4, 3), "float32")})
FEATS = np.arange(24, dtype="float32").reshape(2, 3, 4)
LABELS = np.arange(6).reshape(2, 3)


def test_samples_are_flattened_in_row_major_order():
    weights = np.arange(1, 7).reshape(2, 3)
    samples = flatten_samples(HEAD, FEATS, LABELS, weights)
    np.testing.assert_array_equal(samples.feats, FEATS.reshape(6, 4))
    np.testing.assert_array_equal(samples.labels, LABELS.reshape(6))
    np.testing.assert_allclose(samples.shares, weights.reshape(6) / 21, rtol=1e-7)


def test_targets_keep_their_last_axis():
    samples = flatten_samples(HEAD, FEATS, np.stack([LABELS, -LABELS], axis=-1), None)
    np.testing.assert_array_equal(samples.labels, np.stack([np.arange(6), -np.arange(6)], axis=-1))


def test_one_sample_needs_no_leading_axis():
    samples = flatten_samples(HEAD, FEATS[0, 0], np.int32(2), np.float32(0.3))
    assert samples.feats.shape == (1, 4)
    assert samples.labels.shape == (1,)
    assert samples.shares.tolist() == [1]


@pytest.mark.parametrize("weights", [None, np.full((2, 3), 7)])
def test_equal_weights_are_equal_shares(weights):
    samples = flatten_samples(HEAD, FEATS, LABELS, weights)
    np.testing.assert_allclose(samples.shares, np.full(6, 1 / 6), rtol=1e-7)


def test_weights_of_half_precision_are_summed_in_float32():
    n = 5000  # Whose sum float16 rounds to a multiple of 4, and bfloat16 to one of 32.
    for dtype in ("float16", "bfloat16"):
        samples = flatten_samples(HEAD, np.ones((n, 4), "float32"), np.zeros(n, int), jnp.ones(n, dtype))
        np.testing.assert_allclose(samples.shares, np.full(n, 1 / n), rtol=1e-6)


def test_a_sample_of_weight_zero_holds_nothing():
    feats, labels = FEATS.copy(), LABELS.astype(float)
    feats[1, 1], labels[1, 1] = np.nan, np.nan
    samples = flatten_samples(HEAD, feats, labels, np.ones((2, 3)) - np.eye(6)[4].reshape(2, 3))
    assert np.all(np.isfinite(samples.feats))
    assert np.all(np.isfinite(samples.labels))
    assert samples.shares[4] == 0
    np.testing.assert_allclose(jnp.sum(samples.shares), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "feats", "labels", "weights"),
    [
        (TypeError, "feats has dtype int64, wanted a floating dtype", FEATS.astype(int), LABELS, None),
        (ValueError, r"feats has shape \(2, 3, 3\), but the head takes 4 features", FEATS[..., :3], LABELS, None),
        (ValueError, r"feats has shape \(\), but the head takes 4 features", FEATS[0, 0, 0], LABELS, None),
        (ValueError, r"feats has shape \(0, 3, 4\), which holds no sample", FEATS[:0], LABELS[:0], None),
        (ValueError, r"labels has shape \(6,\), wanted \(2, 3\) or \(2, 3, 3\)", FEATS, LABELS.reshape(6), None),
        (ValueError, r"labels has shape \(\), wanted \(2, 3\)", FEATS, np.int32(0), None),
        (ValueError, r"labels has shape \(2, 3, 1, 1\), wanted", FEATS, LABELS[..., None, None], None),
        (ValueError, r"weights has shape \(6,\), wanted \(2, 3\), one a sample", FEATS, LABELS, np.ones(6)),
        (ValueError, r"weights has shape \(2, 3, 1\), wanted \(2, 3\)", FEATS, LABELS, np.ones((2, 3, 1))),
        (TypeError, "weights has dtype complex128, wanted", FEATS, LABELS, np.ones((2, 3), complex)),
    ],
)
def test_what_does_not_fit_the_head_is_refused(error, match, feats, labels, weights):
    with helpers.raises(error, match):
        flatten_samples(HEAD, feats, labels, weights)


def weighed(labels, weights) -> Samples:
    return flatten_samples(HEAD, np.ones((len(weights), 4), "float32"), np.array(labels), np.array(weights))


def test_a_bad_sample_has_no_share_and_padding_is_not_bad():
    samples = weighed([0, 0, 0, 0], [2.0, 0, 1, 1])
    bad = jnp.array([False, True, True, False])
    np.testing.assert_array_equal(samples.marked(bad, "never").shares, [0.5, 0, np.nan, 0.25])
    np.testing.assert_array_equal(samples.marked(bad, "never").flaws[-1].bad, [False, False, True, False])


def test_weights_whose_sum_overflows_have_no_shares():
    assert np.all(np.isnan(weighed([0] * 6, np.full(6, 3e38, "float32")).shares))


@pytest.mark.parametrize("weight", [np.nan, np.inf, -1.0])
def test_a_weight_that_is_none_has_no_share(weight):
    assert np.isnan(weighed([0, 0], [1.0, weight]).shares[1])


@pytest.mark.parametrize(("label", "bad"), [(-1, True), (0, False), (4, False), (5, True)])
def test_labels_from_zero_to_the_last_class_are_good(label, bad):
    assert np.isnan(mark_class_labels(weighed([1, label], [1.0, 1.0]), 5).shares[1]) == bad


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
def test_the_label_minus_100_is_padding(dtype):
    samples = mark_class_labels(weighed(np.array([3, -100, 1], dtype), [1.0, np.nan, 1.0]), 5)
    np.testing.assert_array_equal(samples.shares, [0.5, 0, 0.5])
    np.testing.assert_array_equal(samples.labels, [3, 3, 1])


def test_where_labels_are_no_classes_minus_100_is_a_label():
    samples = flatten_samples(HEAD, FEATS[0], np.array([3, -100, 1]), None, ignored_label=None)
    assert np.all(samples.counts)
    targets = flatten_samples(HEAD, FEATS[0], np.full((3, 2), -100), None)
    assert np.all(targets.counts)


def test_samples_that_are_all_padding_hold_no_nan():
    feats = np.full((2, 4), np.nan, "float32")
    samples = flatten_samples(HEAD, feats, np.zeros(2, int), np.zeros(2))
    np.testing.assert_array_equal(samples.feats, np.zeros((2, 4)))


@pytest.mark.parametrize(("feature", "bad"), [(1e19, False), (2e19, True), (np.nan, True), (-np.inf, True)])
def test_features_whose_square_overflows_are_bad(feature, bad):
    feats = jnp.ones((2, 4), "float32").at[1, 3].set(feature)
    head = LinearHead(jnp.ones((3, 4), "float32"), jnp.zeros(3, "float32"))
    samples = flatten_samples(head, feats, jnp.zeros(2, int), None)
    assert np.isnan(samples.shares[1]) == bad


UNIT = jnp.ones((), "float32")


def shares_and_slopes(feats, labels, weights, num_classes=5, **options):
    """Of the sum of the samples' numbers, 1, 2, ..., by their shares."""

    def mean(weights):
        samples = flatten_samples(HEAD, feats, labels, weights, unit=UNIT, **options)
        if not options:
            samples = mark_class_labels(samples, num_classes)
        return samples.mean(jnp.arange(1.0, len(weights) + 1, dtype=samples.weights.dtype)), samples

    slopes, samples = jax.grad(mean, has_aux=True)(jnp.asarray(weights, "float32"))
    return samples, np.asarray(slopes)


def test_a_good_sample_of_weight_zero_has_its_own_values_and_the_slope_of_a_mean():
    feats = np.ones((4, 4), "float32") * np.arange(4)[:, None].astype("float32")
    samples, slopes = shares_and_slopes(feats, np.array([0, 1, 4, 3]), [1, 3, 0, 0])
    np.testing.assert_array_equal(samples.feats, feats)
    np.testing.assert_allclose(samples.shares, [0.25, 0.75, 0, 0])
    np.testing.assert_allclose(slopes, (np.arange(1, 5) - 1.75) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("feature", "label"), [(np.nan, 1), (-np.inf, 1), (1e25, 1), (1, 5), (1, -1), (1, -100), (np.nan, -100)]
)
def test_padding_that_holds_no_good_sample_has_no_slope_and_leaves_the_others_theirs(feature, label):
    feats = np.ones((3, 4), "float32")
    feats[1, 2] = feature
    samples, slopes = shares_and_slopes(feats, np.array([0, label, 3]), [1, 0, 3])
    assert np.all(np.isfinite(samples.feats))
    np.testing.assert_allclose(slopes, [(1 - 2.5) / 4, 0, (3 - 2.5) / 4], rtol=1e-6)


@pytest.mark.parametrize(("label", "has_slope"), [(2, True), (1, True), (4, False), (-100, False)])
@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_to_a_loss_of_which_nothing_is_known_a_label_between_those_that_count_is_good(dtype, label, has_slope):
    labels = np.array([1, label, 3], dtype)
    _, slopes = shares_and_slopes(np.ones((3, 4), "float32"), labels, [1, 0, 3], ignored_label=None)
    assert (slopes[1] != 0) == has_slope


@pytest.mark.parametrize(("target", "has_slope"), [(0.7, True), (np.nan, False), (np.inf, False)])
def test_a_target_of_padding_is_good_if_it_is_finite(target, has_slope):
    targets = np.full((3, 5), 0.2, "float32")
    targets[1, 4] = target
    _, slopes = shares_and_slopes(np.ones((3, 4), "float32"), targets, [1, 0, 3], ignored_label=None)
    assert (slopes[1] != 0) == (has_slope and target == targets[0, 4])

    def mean(weights):
        return flatten_samples(HEAD, np.ones((3, 4), "float32"), targets, weights, unit=UNIT).mean(jnp.arange(3.0))

    assert (jax.grad(mean)(jnp.asarray([1.0, 0, 3]))[1] != 0) == has_slope


def test_padding_without_a_finite_value_has_no_part_in_a_mean_and_no_slope():
    def mean(weights):
        samples = flatten_samples(HEAD, np.ones((3, 4)), np.zeros(3, int), weights, unit=UNIT)
        return samples.mean(jnp.array([1, np.inf, 3]))

    value, slopes = jax.value_and_grad(mean)(jnp.array([1.0, 0, 3]))
    np.testing.assert_allclose([value, *slopes], [2.5, -1.5 / 4, 0, 0.5 / 4], rtol=1e-12)


@pytest.mark.parametrize("unit", [2.0**-70, 2.0**60])
def test_features_are_squared_in_their_unit(unit):
    feats = jnp.full((1, 4), 1 / unit, "float32")
    assert np.all(np.isfinite(flatten_samples(HEAD, feats, np.zeros(1, int), None, unit=jnp.float32(unit)).shares))
    huge = jnp.full((1, 4), 2.0**64 / unit if unit > 1 else 2.0**127, "float32")
    assert np.isnan(flatten_samples(HEAD, huge, np.zeros(1, int), None, unit=jnp.float32(unit)).shares[0]) == (unit > 1)


def test_gradients_pass_through_the_shares():
    def third_share(weights):
        return flatten_samples(HEAD, FEATS, LABELS, weights).shares[2]

    got = jax.grad(third_share)(jnp.ones((2, 3)))
    np.testing.assert_allclose(got.reshape(6), (np.eye(6)[2] - 1 / 6) / 6, rtol=1e-6)
