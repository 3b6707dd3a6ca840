"""A learner says what is to be learned by what network: the samples of each seed, and its initial weights."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from flatjax.models import MLP, Transformer
from harness.data import images, modular

Params = dict[str, Any]


class Samples(NamedTuple):
    """Samples are the training set and the held-out set; with an axis in front, those of several seeds."""

    train_x: Any
    train_y: Any
    held_out_x: Any
    held_out_y: Any


class Learner(NamedTuple):
    """A learner is a network with a linear head under `params["head"]`, and what it learns."""

    num_classes: int
    features: Callable[[Params, jax.Array], jax.Array]
    """Function from parameters and inputs (n, ...) to what enters the head, (n, m)."""
    start: Callable[[int], Params]
    """Function from a seed to its initial parameters."""
    samples: Callable[[int], Samples]
    """Function from a seed to its samples."""


def modular_addition(modulus: int, train_share: float, width: int, depth: int = 1, num_heads: int = 4) -> Learner:
    """Learn x + y mod p by a transformer without normalisation, where a seed is a split and a start."""

    def model(seed: int) -> Transformer:
        options: dict[str, Any] = {"width": width, "depth": depth, "num_heads": num_heads, "rngs": nnx.Rngs(seed)}
        return Transformer(
            vocab_size=modular.vocab_size(modulus), num_outputs=modulus, context=modular.CONTEXT, **options
        )

    def samples(seed: int) -> Samples:
        parts = modular.split(modular.equations("add", modulus), train_share, seed)
        return Samples(*(each for part in parts for each in part))

    return _learner(modulus, model, lambda model, x: model.last_features(x), samples)


def image_classification(
    name: images.Name, folder: Path | None, num_train: int, num_held_out: int, width: int, depth: int
) -> Learner:
    """Learn images by a perceptron, where a seed is a choice of images and a start."""

    def samples(seed: int) -> Samples:
        parts = images.load(name, folder, seed)
        train, held_out = (
            part.some(number, seed) for part, number in zip(parts, (num_train, num_held_out), strict=True)
        )
        x = [part.pixels.reshape(len(part.labels), -1).astype(np.float32) for part in (train, held_out)]
        x = [(each - x[0].mean()) / x[0].std() for each in x]
        return Samples(x[0], train.labels, x[1], held_out.labels)

    num_inputs = samples(0).train_x.shape[1]

    def model(seed: int) -> MLP:
        return MLP((num_inputs, *[width] * depth, images.NUM_CLASSES), rngs=nnx.Rngs(seed))

    return _learner(images.NUM_CLASSES, model, lambda model, x: model.features(x), samples)


def _learner(
    num_classes: int,
    model: Callable[[int], nnx.Module],
    features: Callable[[Any, jax.Array], jax.Array],
    samples: Callable[[int], Samples],
) -> Learner:
    graphdef = nnx.graphdef(model(0))
    return Learner(
        num_classes,
        features=lambda params, x: features(nnx.merge(graphdef, params), x),
        start=lambda seed: nnx.to_pure_dict(nnx.state(model(seed), nnx.Param)),
        samples=functools.cache(samples),
    )
