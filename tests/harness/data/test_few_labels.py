"""Digits with few labels, or wrong ones."""

import numpy as np
from scipy import stats

from harness.data import few_labels
from harness.training.small_networks import PARTS


def test_a_draw_has_each_class_alike_and_parts_that_share_no_image():
    labels = few_labels.digits().labels
    drawn = few_labels.draw(labels, few_labels.Task(100, 0.0), 300, seed=3)
    assert np.bincount(drawn.labels[drawn.parts["train"]]).tolist() == [10] * 10
    assert [len(drawn.parts[part]) for part in PARTS] == [100, 300, 797]
    assert len(np.unique(np.concatenate(list(drawn.parts.values())))) == 1197
    np.testing.assert_array_equal(drawn.labels, labels)


def test_so_many_labels_are_wrong_of_the_images_trained_on_and_no_others():
    labels = few_labels.digits().labels
    drawn = few_labels.draw(labels, few_labels.Task(500, 0.4), 300, seed=3)
    wrong = np.flatnonzero(drawn.labels != labels)
    assert len(wrong) == 200
    assert np.isin(wrong, drawn.parts["train"]).all()
    assert drawn.labels.min() == 0
    assert drawn.labels.max() == 9
    shifts = np.bincount((drawn.labels[wrong] - labels[wrong]) % 10, minlength=10)
    assert stats.chisquare(shifts[1:]).pvalue > 1e-3


def test_seeds_differ_in_what_is_trained_on_and_not_in_what_is_tested_on():
    labels = few_labels.digits().labels
    one, other = (few_labels.draw(labels, few_labels.Task(100, 0.0), 300, seed) for seed in (0, 1))
    assert len(np.intersect1d(one.parts["train"], other.parts["train"])) < 40
    np.testing.assert_array_equal(one.parts["test"], other.parts["test"])
