"""Cross-entropy against its plain form in float64, where it is large, and against closed forms where it is tiny."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax import cross_entropy, layer_relative_flatness, relative_flatness


def derivatives(loss, logits):
    """Value, gradient and Hessian of a number."""
    return [each(loss)(logits) for each in (lambda f: f, jax.grad, jax.hessian)]


@jax.jit
def derivatives_of_one(logits, label, smoothing=0.0):
    """Of the loss of one sample."""
    return derivatives(lambda z: cross_entropy(z, label, smoothing), logits)


@jax.jit
def jacobian(logits, labels):
    return jax.jacobian(cross_entropy)(logits, labels)


def test_it_is_cross_entropy_with_its_derivatives():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)))
    labels = jnp.asarray([[0, 1, 2], [3, 4, 0]])

    def summed(loss):
        return lambda logits: jnp.sum(jnp.sin(jnp.arange(6.0).reshape(2, 3)) * loss(logits, labels))

    losses = cross_entropy, optax.softmax_cross_entropy_with_integer_labels
    assert cross_entropy(logits, labels).shape == (2, 3)
    for ours, plain in zip(*jax.jit(lambda z: [derivatives(summed(loss), z) for loss in losses])(logits), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("label", [3, -1, -101])
def test_a_bad_label_is_nan_in_every_derivative_and_other_samples_are_untouched(label):
    logits, labels = np.array([[1.0, 2.0, 0.5], [0.3, -1.0, 0.2]]), np.array([label, 1])
    good = cross_entropy(logits[1:], labels[1:])
    np.testing.assert_array_equal(cross_entropy(logits, labels)[1:], good)
    gradient = np.asarray(jacobian(logits, labels))
    assert np.all(np.isnan(gradient[0, 0]))
    np.testing.assert_array_equal(gradient[1, 1], derivatives_of_one(logits[1], labels[1])[1])
    assert np.all(np.isnan(derivatives_of_one(logits[0], labels[0])[2]))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["int8", "int32", "int64"])
@pytest.mark.parametrize("logits", [[1.0, 2, 0.5], [np.nan, np.inf, -np.inf], [-np.inf] * 3])
def test_the_label_minus_100_is_ignored_with_every_derivative_whatever_the_logits(logits, dtype, smoothing):
    for x in derivatives_of_one(np.array(logits), np.array(-100, dtype), smoothing):
        np.testing.assert_array_equal(x, np.zeros_like(x))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("others", "label"), [(1, 0), (1, 1), (7, 4)])
def test_of_the_one_class_left_the_loss_is_zero_and_so_are_its_derivatives(dtype, others, label):
    logits = np.full(others + 1, -np.inf, jnp.dtype(dtype))
    logits[label] = 3
    for of in (np.array(label), np.eye(others + 1)[label]):
        for x in derivatives_of_one(logits, of):
            np.testing.assert_array_equal(x.astype(float), np.zeros_like(x, float))


def test_the_loss_of_a_label_that_is_left_out_is_infinite():
    logits = jnp.asarray([1.0, -jnp.inf, 0.5])
    assert cross_entropy(logits, jnp.asarray(1)) == np.inf
    assert cross_entropy(logits, jnp.asarray([0.5, 0.5, 0])) == np.inf
    assert cross_entropy(logits, jnp.asarray(0), 0.1) == np.inf


BAD = {
    "+∞ at the label": ([np.inf, 0, 1], 0),
    "+∞ elsewhere": ([0, np.inf, 1], 0),
    "two of +∞": ([np.inf, np.inf, 1], 0),
    "+∞ and −∞": ([np.inf, -np.inf, -np.inf], 0),
    "NaN at the label": ([np.nan, 0, 1], 0),
    "NaN elsewhere": ([0, np.nan, 1], 0),
    "no class left": ([-np.inf] * 3, 0),
    "a negative target": ([0, 0.5, 1], [1.1, -0.1, 0]),
    "a target that is NaN": ([0, 0.5, 1], [1, np.nan, 0]),
    "an infinite target": ([0, 0.5, 1], [1, np.inf, 0]),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", BAD)
def test_what_is_bad_is_nan_in_every_derivative(name, smoothing):
    logits, labels = (np.array(x) for x in BAD[name])
    for x in derivatives_of_one(logits.astype(float), labels, smoothing):
        assert np.all(np.isnan(x))
    assert np.isnan(cross_entropy(logits.astype("float16"), labels, smoothing))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("d", [128_256, 2**18])
def test_half_precision_is_summed_in_float32(dtype, d):
    logits = np.random.default_rng(0).normal(size=(2, d)).astype(jnp.dtype(dtype))
    labels = np.array([5, d - 1])
    gradient, got = jax.jit(
        jax.grad(lambda z: (cross_entropy(z, labels).sum(), cross_entropy(z, labels)), has_aux=True)
    )(logits)
    want = optax.softmax_cross_entropy_with_integer_labels(logits.astype(float), labels)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(gradient[0, 5].astype(float), -1, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16"])
def test_labels_of_a_narrow_dtype_do_not_wrap_around(dtype):
    logits = jnp.zeros((2, 300))
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 100], dtype)), np.full(2, np.log(300)))


def test_labels_of_64_bits_that_jax_would_wrap_around_are_bad_without_x64():
    with jax.enable_x64(False):
        assert np.isnan(cross_entropy(jnp.zeros((1, 3)), np.array([2**32]))).all()


def plain(logits, targets):
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def of_targets(loss, logits, targets):
    return derivatives(lambda z: jnp.sum(jnp.sin(loss(z, targets))), logits)


@pytest.mark.parametrize("mass", [1, 2.5, 0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_targets_are_probabilities_and_their_sum_is_a_factor(dtype, mass):
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(2, 3, 5)), mass * rng.dirichlet(np.ones(5), (2, 3))
    targets[0, 0, :4] = 0
    logits, targets = logits.astype(dtype), targets.astype(dtype)
    rtol = 1e-12 if dtype == "float64" else 1e-5
    got = of_targets(cross_entropy, logits, targets)
    for x, y in zip(got, of_targets(plain, logits.astype(float), targets.astype(float)), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def test_a_target_has_the_slope_of_its_log_probability_at_zero_too():
    logits = jnp.asarray([1.0, 2, 0.5])
    slope = jax.grad(lambda targets: cross_entropy(logits, targets))(jnp.asarray([0.0, 1, 0]))
    np.testing.assert_allclose(slope, -jax.nn.log_softmax(logits), rtol=1e-12)


def derivatives_without_cancellation(logits, label):
    """In float64: p_s − [s = y], and diag(p) − ppᵀ, with 1 − p from the sum of the others."""
    logits = np.asarray(logits, float)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    rest = np.array([np.sum(np.delete(p, s)) for s in range(len(p))])
    gradient = np.where(np.arange(len(p)) == label, -rest, p)
    return np.sum(np.log1p(rest[label] / p[label])), gradient, np.where(np.eye(len(p)), p * rest, -np.outer(p, p))


@pytest.mark.parametrize("soft", [False, True], ids=["class", "one-hot"])
@pytest.mark.parametrize("gap", [5, 30, 70])
@pytest.mark.parametrize("label", [2, 0])
def test_float32_keeps_the_digits_of_the_first_two_derivatives(label, gap, soft):
    logits = np.random.default_rng(0).normal(size=5).astype("float32")
    logits[2] += gap
    got = derivatives_of_one(logits, np.eye(5, dtype="float32")[label] if soft else np.array(label))
    for x, y in zip(got, derivatives_without_cancellation(logits, label), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=0 if gap < 60 else 1e-37)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("classes",), (None, "classes"), ("samples", "classes"), ("samples",)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "targets"])
def test_classes_may_be_split_among_devices(axis_type, spec, soft):
    mesh = jax.make_mesh((2, 4), ("samples", "classes"), axis_types=(axis_type,) * 2)
    logits = np.random.default_rng(0).normal(size=(8, 12))
    labels = np.arange(8) if not soft else np.random.default_rng(1).dirichlet(np.ones(12), 8)
    spec = PartitionSpec(*spec) if spec[0] != "classes" else PartitionSpec(None, "classes")
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
    of_labels = NamedSharding(mesh, spec if soft else PartitionSpec(spec[0]))

    def summed(logits, labels):
        losses = cross_entropy(logits, labels)
        return jnp.sum(losses), losses

    split = jax.jit(jax.value_and_grad(summed, has_aux=True))(place(logits), jax.device_put(labels, of_labels))
    whole = jax.jit(jax.value_and_grad(summed, has_aux=True))(logits, labels)
    for x, y in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("error", "match", "logits", "labels"),
    [
        (TypeError, "logits has dtype int64, wanted a floating", np.zeros((2, 3), int), np.zeros(2, int)),
        (TypeError, r"labels has dtype float64 and shape \(2,\), wanted integer", np.zeros((2, 3)), np.zeros(2)),
        (TypeError, r"labels has dtype bool and shape \(2,\)", np.zeros((2, 3)), np.zeros(2, bool)),
        (TypeError, r"shape \(2, 3\), wanted .* floating targets", np.zeros((2, 3)), np.zeros((2, 3), int)),
        (ValueError, r"labels has shape \(3,\), wanted classes \(2,\) or", np.zeros((2, 3)), np.zeros(3, int)),
        (ValueError, r"labels has shape \(2, 4\), wanted classes", np.zeros((2, 3)), np.zeros((2, 4))),
        (ValueError, r"logits has shape \(\), wanted", np.zeros(()), np.zeros((), int)),
    ],
)
def test_what_does_not_fit_is_refused(error, match, logits, labels):
    with helpers.raises(error, match):
        cross_entropy(logits, labels)


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)])
def test_one_smoothing_is_taken_at_a_time(shape):
    with helpers.raises(ValueError, "smoothing has shape .*, wanted one number"):
        cross_entropy(np.zeros((2, 3)), np.zeros(2, int), np.full(shape, 0.1))


def test_it_is_exported_for_every_platform():
    arguments = jnp.zeros((2, 3), "bfloat16"), jnp.array([0, -100])
    gradient = jax.jit(jax.value_and_grad(lambda z, y: cross_entropy(z, y, 0.1).sum()))
    platforms = ("cpu", "cuda", "tpu")
    assert jax.export.export(gradient, platforms=platforms)(*arguments).platforms == platforms


def test_infinite_logits_leave_their_class_out_and_a_bad_label_is_nan():
    logits = jnp.asarray([[1.0, -jnp.inf, 0.5], [1.0, 2.0, 0.5]])
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 3])), [np.log1p(np.exp(-0.5)), np.nan], rtol=1e-12)


@pytest.mark.parametrize("scale", [32, 64, 128])
def test_in_float32_kappa_of_a_tiny_loss_is_that_of_the_closed_form(scale):
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(16, 7))
    labels = rng.integers(0, 7, 64)
    feats = scale * (kernel.T[labels] + 0.1 * rng.normal(size=(64, 16))) / 4
    params, feats, labels = {"kernel": jnp.asarray(kernel, jnp.float32)}, jnp.asarray(feats, jnp.float32), labels
    closed = relative_flatness(params, feats, labels)

    def loss(params, feats, labels):
        return cross_entropy(feats @ params["kernel"], labels).mean()

    for method in ("outputs", "weights"):
        value = layer_relative_flatness(loss, params, feats, jnp.asarray(labels), layer="kernel", method=method).value
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, closed, rtol=1e-4)
    assert closed < 1e-2
