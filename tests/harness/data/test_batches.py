"""The order in which training takes its samples."""

import numpy as np

from harness.data.batches import all_batches


def test_an_epoch_takes_each_image_once():
    train = np.arange(7, 27)
    order = all_batches(train, 5, 9, seed=0)
    assert order.shape == (9, 5)
    for epoch in (order[:4], order[4:8]):
        np.testing.assert_array_equal(np.sort(epoch.ravel()), train)
    assert (order[:4] != order[4:8]).any()
