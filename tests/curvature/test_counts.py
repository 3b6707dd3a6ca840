"""A batch counts by its labels and weights, whatever keys of random numbers come with it."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax.curvature import Hessian, Streamed, num_samples, trace
from flatjax.curvature.counts import counted

X, LABELS = np.ones((4, 3)), np.array([2, -100, 1, 0])
WEIGHTS = np.array([0.5, 7.0, 0.25, 2.0])
TOKENS = np.array([[1, 2, -100], [-100, -100, 3]])


@pytest.mark.parametrize(
    ("batch", "want"),
    {
        "features alone": ((X,), 4),
        "labels": ((X, LABELS), 3),
        "labels and weights": ((X, LABELS, WEIGHTS), 2.75),
        "labels and a mask": ((X, LABELS, WEIGHTS > 0.3), 2),
        "labels and bfloat16 weights": ((X, LABELS, jnp.asarray(WEIGHTS, jnp.bfloat16)), 2.75),
        "weights of another shape": ((X, LABELS, WEIGHTS[:, None]), 3),
        "weights before the labels": ((WEIGHTS, LABELS), 3),
        "tokens": ((TOKENS,), 3),
        "tokens and a mask": ((TOKENS, np.array([[1.0, 0, 0], [1, 1, 0.5]])), 1.5),
        "inputs and targets of tokens": ((np.arange(6).reshape(2, 3), TOKENS), 3),
        "a dictionary": ({"image": X, "label": LABELS, "weight": WEIGHTS}, 2.75),
        "unsigned labels": ((X, np.arange(4, dtype=np.uint8)), 4),
        "labels of 8 bits": ((X, LABELS.astype(np.int8)), 3),
        "targets of a regression": ((X, WEIGHTS), 4),
        "targets that are booleans": ((X, WEIGHTS > 1), 4),
        "a step before all": ((np.int32(7), X, LABELS), 3),
        "a raw key before features": ((jax.random.PRNGKey(0), X), 4),
        "a raw key after labels": ((X, LABELS, jax.random.PRNGKey(0)), 3),
        "a raw key of NumPy": ((np.asarray(jax.random.PRNGKey(0)), X), 4),
        "a raw key between labels and weights": ((X, LABELS, jax.random.PRNGKey(0), WEIGHTS), 2.75),
        "raw keys, one a sample": ((jax.random.split(jax.random.PRNGKey(0), 4), X, LABELS), 3),
        "a key": ((jax.random.key(0), X, LABELS), 3),
        "keys, one a sample": ((jax.random.split(jax.random.key(0), 4), X), 4),
        "all is padding": ((X, np.full(4, -100)), 0),
    }.values(),
)
def test_the_labels_that_are_not_ignored_count_by_their_weights(batch, want):
    assert num_samples(batch) == want
    assert jax.jit(counted)(batch) == want
    assert num_samples((batch,), count=lambda batch: len(jax.tree.leaves(batch))) == len(jax.tree.leaves(batch))


@pytest.mark.parametrize("batch", [(), (np.float32(1), {}), (jax.random.PRNGKey(0),), (jax.random.key(0), "name")])
def test_a_batch_without_samples_asks_for_a_count(batch):
    with helpers.raises(ValueError, "no array with an axis of samples: give a count"):
        num_samples(batch)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_labels_split_among_devices_count_as_whole(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    labels = jax.device_put(jnp.arange(16) % 3 - 100, NamedSharding(mesh, P("data")))
    weights = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P()))
    assert num_samples((labels,)) == 10
    assert num_samples((labels, weights)) == sum(i for i in range(16) if i % 3)


def loss(w, x, labels, weights):
    """Of one parameter: its second derivative is the weighted mean of x²."""
    counts = weights * (labels != -100).astype(weights.dtype)
    return jnp.sum(counts * (w * x) ** 2 / 2) / jnp.sum(counts)


def padded_batches():
    x = jnp.arange(1.0, 13.0)
    labels = jnp.array([0, 1, -100, 0, 0, 1, 1, -100, -100, -100, -100, 0])
    weights = jnp.array([1.0, 0.5, 1, 0, 2, 1, 1, 1, 1, 1, 1, 3])
    return [tuple(part[i : i + 4] for part in (x, labels, weights)) for i in range(0, 12, 4)], (x, labels, weights)


def trace_of(batches):
    return trace(Streamed(lambda *batch: Hessian(loss, jnp.array(1.0), batch), batches), jax.random.key(0)).value


def test_padded_batches_make_up_the_data_set_inside_jit_or_not():
    batches, (x, labels, weights) = padded_batches()
    want = np.average(x**2, weights=np.where(labels == -100, 0, weights))
    np.testing.assert_allclose(trace_of(batches), want, rtol=1e-13)
    np.testing.assert_allclose(jax.jit(trace_of)(batches), want, rtol=1e-13)


def test_a_batch_of_padding_alone_counts_nowhere_though_its_loss_is_nan():
    batches, (x, labels, weights) = padded_batches()
    padding = jnp.ones(4), jnp.full(4, -100), jnp.ones(4)
    want = np.average(x**2, weights=np.where(labels == -100, 0, weights))
    for compute in (trace_of, jax.jit(trace_of)):
        np.testing.assert_allclose(compute([padding, *batches, padding]), want, rtol=1e-13)
    with helpers.raises(ValueError, "no samples that count"):
        trace_of([padding])
    assert np.isnan(jax.jit(trace_of)([padding]))


@pytest.mark.parametrize("key", [jax.random.PRNGKey, jax.random.key])
def test_a_key_first_in_a_batch_is_no_sample(key):
    def loss(w, key, x):
        return jnp.mean((w * x) ** 2) / 2 + 0 * jax.random.normal(key)

    x = jnp.arange(1.0, 10.0)
    batches = [(key(0), x[:1]), (key(1), x[1:])]
    streamed = Streamed(lambda *batch: Hessian(loss, jnp.array(0.5), batch), batches)
    np.testing.assert_allclose(trace(streamed, jax.random.key(0)).value, np.mean(x**2), rtol=1e-13)
