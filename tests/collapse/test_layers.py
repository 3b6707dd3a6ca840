"""Collapse of all layers of one stream is that of each layer by itself."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import raises

from flatjax.collapse.layers import init_layers, layer_reports, update_layers
from flatjax.collapse.moments import ClassMoments

NUM_CLASSES = 3
SHAPES = {"stem": (2, 3, 2), "wide": (7,), "features": (4,)}
update = jax.jit(update_layers)


def batches(seed=0):
    """Draws batches of one size, for which one program is enough."""
    rng = np.random.default_rng(seed)
    for n in (9, 9, 9):
        labels = rng.integers(0, NUM_CLASSES, n)
        feats = {name: labels.reshape(n, *[1] * len(own)) + rng.normal(size=(n, *own)) for name, own in SHAPES.items()}
        yield feats, labels, rng.uniform(0.5, 2, n)


@functools.cache
def streamed():
    """Moments of all layers, those of `stem` without the covariance."""
    moments = init_layers(*next(batches())[:2], num_classes=NUM_CLASSES, dtype=np.float64, covariance_up_to=7)
    for batch in batches():
        moments = update(moments, *batch)
    return moments


def test_each_layer_has_the_moments_that_it_has_alone():
    moments = streamed()
    for name, own in SHAPES.items():
        alone = ClassMoments.init(NUM_CLASSES, math.prod(own), covariance=name != "stem", dtype=np.float64)
        for feats, labels, weights in batches():
            alone = alone.update(feats[name].reshape(len(labels), -1), labels, weights)
        for got, wanted in zip(jax.tree.leaves(moments[name]), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-13, atol=1e-14)
    assert [moments[name].product_sums is None for name in SHAPES] == [True, False, False]


def test_features_of_any_shape_are_one_vector_a_sample():
    """Class means and CDNV of the layer of shape (2, 3, 2), by loops over its samples."""
    report = layer_reports({"stem": streamed()["stem"]})["stem"]
    feats, labels, weights = (
        np.concatenate(
            [np.reshape(batch[i]["stem"] if i == 0 else batch[i], (len(batch[1]), -1)) for batch in batches()]
        )
        for i in range(3)
    )
    of_class = [(feats[labels[:, 0] == c], weights[labels[:, 0] == c, 0]) for c in range(NUM_CLASSES)]
    means = [np.average(x, axis=0, weights=w) for x, w in of_class]
    spreads = [
        np.average(np.sum((x - mean) ** 2, axis=1), weights=w) for (x, w), mean in zip(of_class, means, strict=True)
    ]
    pairs = [(i, j) for i in range(NUM_CLASSES) for j in range(NUM_CLASSES) if i != j]
    wanted = np.mean([(spreads[i] + spreads[j]) / (2 * np.sum((means[i] - means[j]) ** 2)) for i, j in pairs])
    np.testing.assert_allclose(report.cdnv, wanted, rtol=1e-12)
    assert report.nc1 is None


def test_only_the_layer_that_a_head_reads_has_metrics_of_the_classifier():
    reports = layer_reports(
        streamed(), {"features": {"kernel": np.random.default_rng(1).normal(size=(4, NUM_CLASSES))}}
    )
    assert [reports[name].nc3 is None for name in SHAPES] == [True, True, False]
    assert [reports[name].nc1 is None for name in SHAPES] == [True, False, False]


def test_shapes_alone_are_enough_to_begin_with():
    feats, labels, _ = next(batches())
    shapes = jax.eval_shape(lambda x: x, feats)
    got = init_layers(shapes, jax.ShapeDtypeStruct(labels.shape, labels.dtype), num_classes=NUM_CLASSES)
    wanted = init_layers(feats, labels, num_classes=NUM_CLASSES)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stem": None}, r"feats are of the layers \['features', 'wide'\], but the moments of \['features', 'stem'"),
        ({"stem": np.ones((8, 12))}, r"'stem' have shape \(8, 12\), wanted \(9, '...'\), as labels have \(9,\)"),
        ({"stem": np.ones(9)}, r"'stem' have shape \(9,\), wanted"),
    ],
    ids=["layers", "samples", "no features"],
)  # fmt: skip
def test_features_of_other_layers_or_samples_are_refused(changes, message):
    feats = {"stem": np.ones((9, 12)), "wide": np.ones((9, 7)), "features": np.ones((9, 4))} | changes
    feats = {name: value for name, value in feats.items() if value is not None}
    with raises(ValueError, message):
        update_layers(streamed(), feats, np.zeros(9, int))


def test_a_head_for_a_layer_that_is_not_there_is_refused():
    with raises(ValueError, r"heads are of the layers \['head'\], but the moments of"):
        layer_reports(streamed(), {"head": {"kernel": np.ones((4, 3))}})
