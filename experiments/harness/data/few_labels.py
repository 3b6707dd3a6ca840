"""Handwritten digits are learned from few labels, or from labels some of which are wrong."""

from typing import Literal, NamedTuple

import numpy as np

from harness.data import images
from harness.data.images import NUM_CLASSES, Images

Part = Literal["train", "validation", "test"]

NUM_TEST = 797
"""The test images are the same whatever is drawn, so that nothing is ever tuned on them."""


class Task(NamedTuple):
    """A task is how many images to learn from, equally many of each class, and the share with a wrong label."""

    num_train: int
    noise: float


class Draw(NamedTuple):
    """A draw holds the labels (n,) of all images, wrong for some of the training set, and the indices of each part."""

    labels: np.ndarray
    parts: dict[Part, np.ndarray]


def digits() -> Images:
    """Return all 1797 digits in a random order, which is the same for all."""
    pool, test = images.load("digits", None, seed=0)
    return Images(*(np.concatenate(each) for each in zip(test, pool, strict=True)))


def draw(labels: np.ndarray, task: Task, num_validation: int, seed: int) -> Draw:
    """Choose the training and validation images, and which labels are wrong.

    A wrong label is any of the other classes, each equally likely. The labels of validation and test are right.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.arange(NUM_TEST, len(labels)))
    a_class = task.num_train // NUM_CLASSES
    train = np.concatenate([order[labels[order] == each][:a_class] for each in range(NUM_CLASSES)])
    left = order[~np.isin(order, train)]
    if len(train) != task.num_train or len(left) < num_validation:
        raise SystemExit(
            f"{task.num_train} images to train on and {num_validation} to validate on do not fit, wanted a multiple of "
            f"{NUM_CLASSES} and together well below the {len(order)} that are not tested on"
        )
    wrong = rng.choice(train, round(task.noise * len(train)), replace=False)
    given = labels.copy()
    given[wrong] = (labels[wrong] + rng.integers(1, NUM_CLASSES, len(wrong))) % NUM_CLASSES
    return Draw(given, {"train": train, "validation": left[:num_validation], "test": np.arange(NUM_TEST)})
