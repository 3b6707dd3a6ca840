"""Measure what regularising costs: a training step with relative flatness beside the plain step and beside SAM.

    python experiments/benchmark_training.py regularised    # about 8 minutes on 2 cores
    python experiments/benchmark_training.py by-product     # what it costs to know κ at every step: 3 minutes

Prints a table and writes the same figures to `runs/benchmark/`. Every figure is a median over rounds in
which the steps take turns; a ratio is taken within a round, and stands with its quartiles. A step is jitted whole: the
gradient, what is added to it, and Adam's update, with its buffers donated.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx

from flatjax import cross_entropy_and_flatness, flat_reg, relative_flatness
from flatjax.models import ResNet18, Transformer
from flatjax.run.records import write_record
from flatjax.training import sharpness_aware
from harness.benchmarks.timing import side_by_side

STRENGTH = 0.01
Step = Callable[[Any, Any], tuple[Any, Any]]
"""A step takes and returns `(params, state)`."""
Maker = Callable[["Task"], tuple[Step, optax.GradientTransformation]]


class Task(NamedTuple):
    """A task is a network, as what enters its head, with a batch."""

    features: Callable[[Any, jax.Array], jax.Array]
    """The features (n, m) are those of inputs with as many rows as they have labels."""
    params: Any
    inputs: jax.Array
    labels: jax.Array

    def logits(self, params: Any, feats: jax.Array) -> jax.Array:
        logits = feats @ params["head"]["kernel"]
        return logits + params["head"]["bias"][None, :] if "bias" in params["head"] else logits

    def loss(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Return the cross-entropy, and the features with it."""
        feats = self.features(params, self.inputs)
        logits = self.logits(params, feats)
        return optax.softmax_cross_entropy_with_integer_labels(logits, self.labels.ravel()).mean(), feats

    def loss_and_flatness(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """Return the cross-entropy and κ, computed in tiles of the head."""
        return cross_entropy_and_flatness(params["head"], self.features(params, self.inputs), self.labels.ravel())


def regularised(seconds: float = 60, seed: int = 0, folder: Path = Path("runs/benchmark")) -> None:
    """Time training steps of a transformer with 6 blocks, 256 features and 8192 tokens, and of ResNet-18 at width 16.

    Args:
        seconds: least time for which each network is measured, in 5 rounds or more.
        seed: seed of the networks and the data.
        folder: folder for the record.
    """
    record = []
    for context in (256, 1024):
        record += timed(f"transformer, context {context}", transformer(seed, context=context), STEPS, "plain", seconds)
    record += timed("ResNet-18", resnet(seed), STEPS, "plain", seconds)
    write_record(folder / "training.json", record)


def by_product(
    vocabularies: tuple[int, ...] = (8192, 50_257),
    seconds: float = 60,
    seed: int = 0,
    folder: Path = Path("runs/benchmark"),
) -> None:
    """Time the transformer with context 256, where κ of the head is known but not trained with.

    Args:
        vocabularies: sizes of the vocabulary to measure.
        seconds: least time for which each network is measured, in 5 rounds or more.
        seed: seed of the networks and the data.
        folder: folder for the record.
    """
    record = []
    for size in vocabularies:
        task = transformer(seed, context=256, vocab_size=size)
        record += timed(f"{size} tokens", task, KNOWN, "cross-entropy in tiles", seconds)
    write_record(folder / "by_product.json", record)


def timed(name: str, task: Task, steps: dict[str, Maker], reference: str, seconds: float) -> list[dict[str, Any]]:
    record = []
    calls = {each: Training(*make(task), task.params) for each, make in steps.items()}
    for each, timing in side_by_side(calls, reference=reference, min_seconds=seconds).items():
        low, high = timing.ratio_quartiles
        print(
            f"{name:26} {each:40} {1e3 * timing.seconds:8.1f} ms  {timing.ratio:.3f} [{low:.3f}, {high:.3f}]",
            flush=True,
        )
        record.append({"network": name, "step": each, **timing._asdict()})
    return record


class Training:
    """A network is in training: each call takes it one step further."""

    def __init__(self, step: Step, tx: optax.GradientTransformation, params: Any):
        params = jax.tree.map(jnp.copy, params)
        self.carry, self.step = (params, tx.init(params)), jax.jit(step, donate_argnums=(0, 1))

    def __call__(self) -> Any:
        self.carry = self.step(*self.carry)
        return self.carry


def plain(task: Task) -> tuple[Step, optax.GradientTransformation]:
    tx = optax.adam(1e-3)
    return by_gradient(lambda params: task.loss(params)[0], tx), tx


def joint(task: Task) -> tuple[Step, optax.GradientTransformation]:
    def loss(params: Any) -> jax.Array:
        cross_entropy, kappa = task.loss_and_flatness(params)
        return cross_entropy + STRENGTH * kappa

    tx = optax.adam(1e-3)
    return by_gradient(loss, tx), tx


def joint_of_some(task: Task) -> tuple[Step, optax.GradientTransformation]:
    def loss(params: Any) -> jax.Array:
        cross_entropy, feats = task.loss(params)
        return cross_entropy + STRENGTH * relative_flatness(params["head"], feats[::4], task.labels.ravel()[::4])

    tx = optax.adam(1e-3)
    return by_gradient(loss, tx), tx


def by_penalty(task: Task, every: int = 1) -> tuple[Step, optax.GradientTransformation]:
    def kappa(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        inputs, labels = batch
        return relative_flatness(params["head"], task.features(params, inputs), labels.ravel())

    tx = optax.chain(flat_reg(STRENGTH, kappa), optax.adam(1e-3))
    batch = task.inputs[::every], task.labels[::every]
    return by_gradient(lambda params: task.loss(params)[0], tx, batch=batch), tx


def by_penalty_of_some(task: Task) -> tuple[Step, optax.GradientTransformation]:
    return by_penalty(task, 2)


def of_head(task: Task, every: int = 1) -> tuple[Step, optax.GradientTransformation]:
    tx = optax.chain(flat_reg(STRENGTH, head="head"), optax.adam(1e-3))

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads, feats = jax.grad(task.loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, feats=feats[::every], labels=task.labels.ravel()[::every])
        return optax.apply_updates(params, updates), state

    return step, tx


def of_head_of_some(task: Task) -> tuple[Step, optax.GradientTransformation]:
    return of_head(task, 4)


def sam(task: Task) -> tuple[Step, optax.GradientTransformation]:
    tx = sharpness_aware(optax.adam(1e-3), 0.05)

    def gradient(params: Any, step: Any = None) -> Any:
        return jax.grad(lambda params: task.loss(params)[0])(params)

    return by_gradient(lambda params: task.loss(params)[0], tx, grad_fn=gradient), tx


def in_tiles(task: Task) -> tuple[Step, optax.GradientTransformation]:
    tx = optax.adam(1e-3)
    return by_gradient(lambda params: task.loss_and_flatness(params)[0], tx), tx


def known(task: Task) -> tuple[Step, optax.GradientTransformation]:
    tx = optax.adam(1e-3)

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads, kappa = jax.grad(task.loss_and_flatness, has_aux=True)(params)
        updates, adam = tx.update(grads, state["adam"], params)
        return optax.apply_updates(params, updates), {"adam": adam, "kappa": kappa}

    def init(params: Any) -> Any:
        return {"adam": tx.init(params), "kappa": jnp.zeros(())}

    return step, optax.GradientTransformation(init, tx.update)


STEPS: dict[str, Maker] = {
    "plain": plain,
    "κ in the loss": joint,
    "κ of 1 token in 4 in the loss": joint_of_some,
    "flat_reg": by_penalty,
    "flat_reg of every other sequence": by_penalty_of_some,
    "flat_reg of the head": of_head,
    "flat_reg of the head, of 1 token in 4": of_head_of_some,
    "SAM": sam,
}
KNOWN: dict[str, Maker] = {"plain": plain, "cross-entropy in tiles": in_tiles, "the same, and κ": known}


def by_gradient(loss: Callable[[Any], jax.Array], tx: optax.GradientTransformation, **needed: Any) -> Step:
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optax.with_extra_args_support(tx).update(jax.grad(loss)(params), state, params, **needed)
        return optax.apply_updates(params, updates), state

    return step


def transformer(
    seed: int, *, context: int, depth: int = 6, width: int = 256, vocab_size: int = 8192, num_tokens: int = 2048
) -> Task:
    """Build a transformer on random tokens, in as many sequences as they fill."""
    model = Transformer(
        vocab_size=vocab_size, num_outputs=vocab_size, context=context, width=width, depth=depth, normalise=True,
        rngs=nnx.Rngs(seed),
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(seed), (num_tokens // context, context + 1), 0, vocab_size)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def features(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest).features(inputs).reshape(-1, width)

    return Task(features, nnx.to_pure_dict(params), tokens[:, :-1], tokens[:, 1:])


def resnet(seed: int, *, width: int = 16, num_images: int = 32) -> Task:
    """Build a ResNet on images 32 × 32, with the statistics of the batch."""
    model = ResNet18(10, channels_in=3, width=width, rngs=nnx.Rngs(seed))
    images = jax.random.normal(jax.random.key(seed), (num_images, 32, 32, 3))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def features(params: Any, inputs: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, rest, copy=True).features(inputs)

    return Task(features, nnx.to_pure_dict(params), images, jnp.arange(num_images) % 10)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"regularised": regularised, "by-product": by_product})
