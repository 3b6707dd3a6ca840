"""What neural collapse does not depend on: place, size and orientation of the features, and the order of anything."""

import numpy as np
import pytest

from .cases import METRICS, SHAPES, assert_close, measure, random_case

OF_FEATURES = [name for name in METRICS if not name.endswith("classifier") and name not in ("nc3", "nc4")]
ROUNDING = {"rtol": 1e-12, "atol": 1e-13}

pytestmark = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3], ids=str)
def test_features_may_be_rotated_scaled_and_moved_and_the_head_with_them(shape, scale):
    case = random_case(*shape)
    rng = np.random.default_rng(7)
    rotation = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))[0]
    offset = scale * rng.normal(size=shape[1])
    moved = case._replace(feats=scale * case.feats @ rotation.T + offset)
    assert_close(measure(moved), measure(case), **ROUNDING, names=OF_FEATURES)
    # The others stay what they are when the head gives the logits that it gave.
    kernel = rotation @ case.kernel / scale
    assert_close(measure(moved._replace(kernel=kernel, bias=case.bias - offset @ kernel)), measure(case), **ROUNDING)


def test_the_order_of_the_samples_does_not_matter(shape):
    case = random_case(*shape)
    order = np.random.default_rng(8).permutation(len(case.feats))
    shuffled = case._replace(feats=case.feats[order], labels=case.labels[order], weights=case.weights[order])
    assert_close(measure(shuffled), measure(case), **ROUNDING)


def test_the_names_of_the_classes_do_not_matter(shape):
    case = random_case(*shape)
    order = np.random.default_rng(9).permutation(len(case.bias))
    renamed = case._replace(kernel=case.kernel[:, order], bias=case.bias[order], labels=np.argsort(order)[case.labels])
    assert_close(measure(renamed), measure(case), **ROUNDING)


def test_every_sample_may_be_there_twice(shape):
    case = random_case(*shape)
    # Every other sample of each class twice: as many as there were, for which `measure` is compiled.
    half = np.argsort(case.labels)[::2]
    first = case._replace(weights=np.where(np.isin(np.arange(len(case.labels)), half), case.weights, 0))
    twice = np.concatenate([half, half])
    doubled = case._replace(feats=case.feats[twice], labels=case.labels[twice], weights=case.weights[twice])
    assert_close(measure(doubled), measure(first), **ROUNDING)
