"""Handwritten digits to be learned from few labels, or from labels some of which are wrong."""

from typing import Literal, NamedTuple

import numpy as np

from harness.data import images
from harness.data.images import NUM_CLASSES, Images

Part = Literal["train", "validation", "test"]

NUM_TEST = 797
"""The same images whatever is drawn, so that nothing is ever tuned on them."""


class Task(NamedTuple):
    """How many images to learn from, as many of each class, and the share of them with a wrong label."""

    num_train: int
    noise: float


class Draw(NamedTuple):
    """Labels (n,) of all images, wrong for some of those trained on, and the indices of each part."""

    labels: np.ndarray
    parts: dict[Part, np.ndarray]


def digits() -> Images:
    """All 1797 of them in random order, one order for all."""
    pool, test = images.load("digits", None, seed=0)
    return Images(*(np.concatenate(each) for each in zip(test, pool, strict=True)))


def draw(labels: np.ndarray, task: Task, num_validation: int, seed: int) -> Draw:
    """Chooses what is trained on, what is validated on, and which labels are wrong.

    A wrong label is any of the other classes, each as likely. Those of validation and test are right.
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
