"""Image classifiers are trained in stretches with measurements between them, and resumed where they stopped."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flatjax.run.checkpoints import checkpointer, load_latest
from flatjax.run.progress import Progress
from flatjax.run.records import Record, RunFolder
from harness.data.batches import batch_at
from harness.data.images import Images

State = dict[str, Any]
"""A state holds parameters, running statistics, and the optimizer's state."""

LossOfSamples = Callable[[jax.Array, jax.Array], jax.Array]
"""A loss takes logits (n, d) and labels (n,), and returns a value for each sample (n,)."""


class Classifier(NamedTuple):
    """A network is a model's structure as trained and as used; these differ only in batch normalisation."""

    in_training: nnx.GraphDef
    in_use: nnx.GraphDef
    mean: jax.Array
    """Mean (1, 1, 1, c) of the training set's channels."""
    deviation: jax.Array
    is_flat: bool
    """Whether the model takes vectors instead of images."""

    def inputs(self, pixels: jax.Array) -> jax.Array:
        x = (pixels.astype(jnp.float32) - self.mean) / self.deviation
        return x.reshape(len(x), -1) if self.is_flat else x

    def model(self, params: State, rest: State) -> Any:
        """Build the model as it is used."""
        return nnx.merge(self.in_use, params, rest)


def network_of(
    model: Any, train_set: Images, optimizer: optax.GradientTransformation, *, is_flat: bool
) -> tuple[Classifier, State]:
    """Return the structure of a new model, and the state that training starts from."""
    model.train()
    in_training = nnx.graphdef(model)
    model.eval()
    in_use, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    network = Classifier(in_training, in_use, *_channels(train_set.pixels), is_flat=is_flat)
    return network, {"params": params, "rest": rest, "optimizer": optimizer.init(params)}


def _channels(pixels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Return mean and standard deviation of each channel, from how often each of the 256 values occurs."""
    values = np.arange(256)
    counts = [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, -1, 0)]
    means = np.array([np.average(values, weights=count) for count in counts])
    variances = [np.average((values - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    mean, deviation = (jnp.asarray(each, jnp.float32)[None, None, None, :] for each in (means, np.sqrt(variances)))
    return mean, deviation


def training(
    network: Classifier,
    loss: LossOfSamples,
    optimizer: optax.GradientTransformation,
    train_set: Images,
    *,
    batch_size: int,
    seed: int,
) -> Callable[[State, int, int], State]:
    """Return training from a step to another, compiled once."""
    num_train = len(train_set.labels)
    batch_size = min(batch_size, num_train)
    batch_key = jax.random.fold_in(jax.random.key(seed), 0)

    def mean_loss(params: State, rest: State, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, State]:
        model = nnx.merge(network.in_training, params, rest, copy=True)
        logits = model(network.inputs(pixels))
        _, _, renewed = nnx.split(model, nnx.Param, ...)
        return loss(logits, labels).mean(), nnx.to_pure_dict(renewed)

    def one_step(step: jax.Array, state: State, pixels: jax.Array, labels: jax.Array) -> State:
        chosen = batch_at(batch_key, step, num_train, batch_size)
        grads, rest = jax.grad(mean_loss, has_aux=True)(state["params"], state["rest"], pixels[chosen], labels[chosen])
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["params"])
        return {
            "params": optax.apply_updates(state["params"], updates),
            "rest": rest,
            "optimizer": optimizer_state,
        }

    @functools.partial(jax.jit, donate_argnums=0)
    def steps(state: State, first: int, end: int, pixels: jax.Array, labels: jax.Array) -> State:
        return jax.lax.fori_loop(first, end, lambda step, state: one_step(step, state, pixels, labels), state)

    on_device = tuple(map(jnp.asarray, train_set))
    return lambda state, first, end: steps(state, first, end, *on_device)


def evaluating(
    network: Classifier, loss: LossOfSamples, parts: Mapping[str, Images], at_a_time: int = 500
) -> Callable[[State], Record]:
    """Return mean loss and accuracy of each part, as `<part>_loss` and `<part>_accuracy`."""

    @jax.jit
    def sums(state: State, pixels: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        outputs = network.model(state["params"], state["rest"])(network.inputs(pixels))
        return {"loss": loss(outputs, labels).sum(), "accuracy": jnp.sum(jnp.argmax(outputs, axis=1) == labels)}

    def evaluate(state: State) -> Record:
        record: Record = {}
        for part, chosen in parts.items():
            totals = [sums(state, *batch) for batch in in_batches(chosen, at_a_time)]
            for name in totals[0]:
                record[f"{part}_{name}"] = sum(float(total[name]) for total in totals) / len(chosen.labels)
        return record

    return evaluate


def in_batches(chosen: Images, size: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    for start in range(0, len(chosen.labels), size):
        yield jnp.asarray(chosen.pixels[start : start + size]), jnp.asarray(chosen.labels[start : start + size])


def at_equal_ratios(last: int, number: int) -> set[int]:
    """Return 0, and numbers from 1 to `last` at equal ratios, rounded; those that coincide are given once."""
    return {0, *np.round(np.geomspace(1, last, number)).astype(int).tolist(), last}


def train_and_measure(
    run: RunFolder,
    key: Record,
    state: State,
    train_some: Callable[[State, int, int], State],
    measure: Callable[[State, int], Record],
    *,
    steps_measured: Collection[int],
    checkpoint_every: int,
) -> None:
    """Train from the last checkpoint to the last of `steps_measured`, with a record at each of them.

    Args:
        run: folder for the records.
        key: name of this network's records and checkpoints, as its seed.
        state: state that training starts from.
        train_some: trains from a step to another.
        measure: measures the state after a step; the bar shows the `test_accuracy` that it returns.
        steps_measured: steps to measure at; 0 is before the first.
        checkpoint_every: steps between two checkpoints; each measurement leaves a checkpoint too.
    """
    last = max(steps_measured)
    name = "-".join(value if isinstance(value, str) else f"{kind}-{value}" for kind, value in key.items())
    stops = sorted({*steps_measured, *range(0, last, checkpoint_every)})
    with checkpointer(run.path / "checkpoints" / name) as checkpoints:
        step, state = load_latest(checkpoints, state)
        run.keep(lambda record: any(record[each] != key[each] for each in key) or record["step"] <= step)
        with Progress(name, {"step": last, "measurement": len(steps_measured)}) as progress:
            progress.were_done({"step": max(step, 0), "measurement": sum(each <= step for each in steps_measured)})
            for stop in (each for each in stops if each > step):
                if stop:
                    state = jax.block_until_ready(train_some(state, max(step, 0), stop))
                    progress.done("step", stop - max(step, 0))
                step = stop
                if step in steps_measured:
                    record = key | {"step": step} | measure(state, step)
                    run.append(record)
                    progress.done("measurement", note=f"accuracy {record['test_accuracy']:.1%} held out")
                checkpoints.save(step, state)
