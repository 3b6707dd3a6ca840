"""Train many small networks in one program, which differ in their data, their start and their settings."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flatjax import cross_entropy, relative_flatness
from flatjax.run.records import Record
from harness.training.parallel import Parallel
from harness.training.regularisers import Regulariser

State = dict[str, Any]


class TrainedNetwork(NamedTuple):
    """A network is a model's structure as trained and as used; these differ only in batch normalisation."""

    in_training: nnx.GraphDef
    in_use: nnx.GraphDef
    start: Callable[[int], State]
    """Function from a seed to parameters and running statistics."""


class Trial(NamedTuple):
    """A trial is a network to be trained; with an axis in front of all fields, it is several."""

    start: State
    labels: Any
    """Labels (n,) of all images, right or wrong."""
    parts: Any
    """Part (n,) of each image: 0 is none, then those of `PARTS`."""
    batches: Any
    """Indices (steps, batch) of the images in each batch."""
    learning_rate: Any
    strength: Any


PARTS = ("train", "validation", "test")


def network(model: Callable[[nnx.Rngs], Any]) -> TrainedNetwork:
    @functools.cache
    def start(seed: int) -> State:
        params, rest = (nnx.to_pure_dict(each) for each in nnx.split(model(nnx.Rngs(seed)), nnx.Param, ...)[1:])
        return jax.tree.map(np.asarray, {"params": params, "rest": rest})

    example = model(nnx.Rngs(0))
    example.train()
    in_training = nnx.graphdef(example)
    example.eval()
    return TrainedNetwork(in_training, nnx.graphdef(example), start)


def train(
    network: TrainedNetwork, method: Regulariser, num_steps: int, trial: Trial, images: jax.Array, end: jax.Array
) -> State:
    """Train for the first `end` of `num_steps` steps of SGD with momentum 0.9 and a rate that falls to 0."""
    rate = optax.cosine_decay_schedule(trial.learning_rate, num_steps)
    optimizer = method.optimizer(optax.sgd(rate, momentum=0.9), trial.strength)
    update = optax.with_extra_args_support(optimizer).update

    def one_step(step: jax.Array, state: State) -> State:
        chosen = trial.batches[step]

        def loss(params: State, _: Any = None) -> tuple[jax.Array, State]:
            model = nnx.merge(network.in_training, params, state["rest"], copy=True)
            value = method.objective(
                params["head"], model.features(images[chosen]), trial.labels[chosen], trial.strength
            )
            _, _, renewed = nnx.split(model, nnx.Param, ...)
            return value, nnx.to_pure_dict(renewed)

        gradient = jax.grad(loss, has_aux=True)
        grads, rest = gradient(state["params"])
        updates, optimizer_state = update(
            grads, state["optimizer"], state["params"], grad_fn=lambda *perturbed: gradient(*perturbed)[0]
        )
        return {
            "params": optax.apply_updates(state["params"], updates),
            "rest": rest,
            "optimizer": optimizer_state,
        }

    state = jax.lax.fori_loop(0, end, one_step, trial.start | {"optimizer": optimizer.init(trial.start["params"])})
    return {name: state[name] for name in ("params", "rest")}


def measure(network: TrainedNetwork, trial: Trial, state: State, images: jax.Array) -> dict[str, jax.Array]:
    """Measure the accuracy of each part by the labels given, and the training set's loss and κ.

    The accuracy is NaN if the network diverged.
    """
    model = nnx.merge(network.in_use, state["params"], state["rest"])
    feats = model.features(images)
    logits = model.head(feats)
    right = jnp.where(jnp.all(jnp.isfinite(logits)), jnp.argmax(logits, axis=1) == trial.labels, jnp.nan)
    is_in = {part: trial.parts == place for place, part in enumerate(PARTS, start=1)}
    weights = is_in["train"].astype(feats.dtype)
    return {f"{part}_accuracy": jnp.mean(right, where=is_in[part]) for part in PARTS} | {
        "train_loss": jnp.mean(cross_entropy(logits, trial.labels), where=is_in["train"]),
        "relative_flatness": relative_flatness(state["params"]["head"], feats, trial.labels, weights=weights),
    }


class Programs:
    """Programs run `train` and `measure` for as many networks at a time as there are devices, one on each.

    All that differs between two networks of a method is an argument, so that each method is compiled once.
    """

    def __init__(self, network: TrainedNetwork, images: np.ndarray, num_steps: int):
        self.network, self.num_steps = network, num_steps
        self.images = jnp.asarray(images)
        self.parallel = Parallel()
        self._train: dict[str, Callable[..., State]] = {}
        self._measure = self.parallel.map(functools.partial(measure, network), num_split=2)

    def run(self, method: Regulariser, trials: list[Trial]) -> list[Record]:
        """Train at most as many networks as there are devices, and return what is measured of each."""
        several = self.parallel.stack(trials)
        measured = jax.device_get(self._measure(several, self.train(method, several), self.images))
        return [{name: values[i].item() for name, values in measured.items()} for i in range(len(trials))]

    def train(self, method: Regulariser, several: Trial, end: int | None = None) -> State:
        """Train up to the step `end`."""
        if method.name not in self._train:
            function = functools.partial(train, self.network, method, self.num_steps)
            self._train[method.name] = self.parallel.map(function, num_split=1)
        return self._train[method.name](several, self.images, self.num_steps if end is None else end)
