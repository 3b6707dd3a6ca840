"""Measure which layers of a network are flat: κ of every layer, with its standard error, over training.

    python experiments/layer_flatness.py                   # a perceptron on scikit-learn's digits: a minute on 2 cores
    python experiments/layer_flatness.py vit               # 2 to 3 min
    python experiments/layer_flatness.py resnet --data cifar10 --data-dir ~/data --width 64 --num-train 50000

κ is that of a fixed part of what is trained on, streamed in batches, with batch normalisation as it is used after
training: the running statistics are constants. The network is trained by AdamW, without augmentation.

Writes to `runs/layer_flatness/<name>/`: `config.json`, `metrics.jsonl` (a line a measurement, with the whole profile),
`checkpoints/` (Orbax), `profile.png` (the end), `history.png` (over training) and `summary.json`. Killed at any moment,
the same command with --resume goes on, and ends with the same metrics to the last bit.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import tyro
from flax import nnx

from flatjax import cross_entropy, flatness_profile
from flatjax.layers import find_layers
from flatjax.layers.names import in_forward_order
from flatjax.models import MLP, ResNet18, ViT
from flatjax.run.options import SeedOptions, check_least, variant_of
from flatjax.run.records import Record, RunFolder
from harness.data import images
from harness.data.images import Images
from harness.results.profiles import Profile, draw_history, draw_profile, from_record, over_seeds, table
from harness.training.classifiers import (
    Classifier,
    State,
    at_equal_ratios,
    evaluating,
    in_batches,
    network_of,
    train_and_measure,
    training,
)


@dataclasses.dataclass(frozen=True)
class Config(SeedOptions):
    """Train a network, and measure relative flatness of all its layers on the way."""

    model: tyro.conf.Suppress[Literal["mlp", "resnet", "vit"]] = "mlp"
    """Network to train: a perceptron, a ResNet-18, or a vision transformer with patches a quarter of the image wide."""
    data: images.Name = "digits"
    """Images to classify; all but the digits are read from `data_dir`."""
    data_dir: Path | None = None
    """Folder of the data's files, as they are published."""
    num_train: int | None = None
    """Number of images to train on; by default all."""
    width: int = 128
    """Width of the hidden layers, of the first stage, or of the residual stream."""
    depth: int = 4
    """Number of hidden layers of a perceptron, or of blocks of a transformer; it is 0 for a ResNet-18."""
    activation: Literal["relu", "tanh", "gelu"] = "gelu"
    """Activation of the perceptron's layers."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW, reached after `warmup` steps."""
    warmup: int = 50
    """Number of steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW, on all parameters."""
    batch_size: int = 128
    """Number of images per step."""
    steps: int = 3000
    """Number of training steps."""
    measurements: int = 20
    """Number of measurements at equal ratios of the step; one more comes before the first step."""
    measure_on: int = 512
    """Number of training images that κ is measured on."""
    measure_batch: int = 256
    """Number of these images that are measured at a time."""
    evaluate_on: int = 10_000
    """Largest number of images for loss and accuracy, of the training set and of the test set each."""
    num_probes: int = 16
    """Least number of probes per layer and batch."""
    max_probes: int = 128
    """Largest number of probes per layer and batch."""
    relative_error: float | None = 0.1
    """Probes are added until the standard error is this share of κ, for every layer."""
    route: Literal["layerwise", "joint"] = "layerwise"
    """Route to κ: one product per layer and probe, or one for all layers, noisier but compiled once."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; each measurement leaves a checkpoint too."""
    folder: Path = Path("runs/layer_flatness")

    may_differ = frozenset({"data_dir", "seed", "seeds"})

    def __post_init__(self):
        if self.depth and self.model == "resnet":
            raise SystemExit(f"--depth is {self.depth}, but --model resnet has 18 layers")
        if self.model == "vit" and self.width % _HEADS:
            raise SystemExit(f"--width is {self.width}, wanted a multiple of the {_HEADS} heads of --model vit")
        check_least(self, 1, "steps", "batch_size", "measure_batch", "evaluate_on", "checkpoint_every", "seeds")
        check_least(self, 1, "width", "measurements", "measure_on", "max_probes")
        check_least(self, 0 if self.model == "resnet" else 1, "depth")

    @property
    def default_name(self) -> str:
        return f"{self.model}-{self.data}"


_HEADS = 4
_COSTLY: Record = {"measurements": 10, "measure_on": 128, "max_probes": 24, "route": "joint"}
MODELS = {
    "mlp": ("A perceptron", Config()),
    "resnet": ("A ResNet-18", Config(model="resnet", width=8, depth=0, **_COSTLY)),
    "vit": ("A vision transformer", Config(model="vit", width=32, depth=2, **_COSTLY)),
}
"""These networks can be trained; each has its own defaults."""


def main(config: Config) -> None:
    """Run every seed, draw the figures, and print the last profile."""
    run = config.open_run()
    seeds = config.all_seeds
    started = time.monotonic()
    for seed in seeds:
        train(config, seed, run)
    curves = [[record for record in run.records if record["seed"] == seed] for seed in seeds]
    report(config, run, curves)
    print(f"{time.monotonic() - started:.0f} s. The figures are in {run.path}")


def train(config: Config, seed: int, run: RunFolder) -> None:
    """Train one seed from its last checkpoint to its end, and measure on the way."""
    train_set, test_set = images.load(config.data, config.data_dir, seed)
    train_set = train_set.some(config.num_train, seed)
    network, state = initial(config, seed, train_set)
    train_and_measure(
        run,
        {"seed": seed},
        state,
        training(network, cross_entropy, optimizer(config), train_set, batch_size=config.batch_size, seed=seed),
        measuring(config, network, seed, train_set, test_set),
        steps_measured=at_equal_ratios(config.steps, config.measurements),
        checkpoint_every=config.checkpoint_every,
    )


def initial(config: Config, seed: int, train_set: Images) -> tuple[Classifier, State]:
    """Return the network, and its parameters, running statistics and optimizer state."""
    _, size, _, channels = train_set.pixels.shape
    rngs = nnx.Rngs(seed)
    match config.model:
        case "mlp":
            hidden = [config.width] * config.depth
            widths = (size * size * channels, *hidden, images.NUM_CLASSES)
            model = MLP(widths, activation=config.activation, rngs=rngs)
        case "resnet":
            model = ResNet18(images.NUM_CLASSES, channels_in=channels, width=config.width, rngs=rngs)
        case "vit":
            model = ViT(
                images.NUM_CLASSES,
                image_size=size,
                patch_size=size // 4,
                channels_in=channels,
                width=config.width,
                depth=config.depth,
                num_heads=_HEADS,
                rngs=rngs,
            )
    return network_of(model, train_set, optimizer(config), is_flat=config.model == "mlp")


def optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0, config.learning_rate, config.warmup)
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def measuring(config: Config, network: Classifier, seed: int, train_set: Images, test_set: Images):
    """Return how to measure loss and accuracy on both parts, and the profile on a fixed part of the training set."""

    def loss(params: State, pixels: jax.Array, labels: jax.Array, rest: State) -> jax.Array:
        return cross_entropy(network.model(params, rest)(network.inputs(pixels)), labels).mean()

    probe_key = jax.random.fold_in(jax.random.key(seed), 1)
    parts = {"train": train_set.some(config.evaluate_on, seed), "test": test_set.some(config.evaluate_on, seed)}
    evaluate = evaluating(network, cross_entropy, parts)
    profiled = list(in_batches(train_set.some(config.measure_on, seed), config.measure_batch))

    def measure(state: State, step: int) -> Record:
        profile = flatness_profile(
            loss,
            state["params"],
            [(*batch, state["rest"]) for batch in profiled],
            key=jax.random.fold_in(probe_key, step),
            layers=in_forward_order(list(find_layers(state["params"]))),
            num_probes=config.num_probes,
            max_probes=config.max_probes,
            relative_error=config.relative_error,
            route=config.route or "layerwise",
        )
        return evaluate(state) | {"profile": profile}

    return measure


def report(config: Config, run: RunFolder, curves: list[list[Record]]) -> None:
    """Write the table of the last profile, the figures and the summary, over the seeds if there are several."""
    steps = [record["step"] for record in curves[0]]
    profiles: list[Profile] = [
        over_seeds([from_record(record["profile"]) for record in at_step]) for at_step in zip(*curves, strict=True)
    ]
    accuracies = {
        name: np.mean([[record[key] for record in curve] for curve in curves], axis=0).tolist()
        for name, key in {"trained on": "train_accuracy", "held out": "test_accuracy"}.items()
    }
    seeds = f", mean of {len(curves)} seeds ± its standard error" if len(curves) > 1 else ""
    title = f"{_NAMES[config.model]} on {config.data}{seeds}"
    draw_profile(run.path / "profile.png", profiles[-1], f"{title}, step {steps[-1]}")
    draw_history(run.path / "history.png", steps, profiles, accuracies, title)
    last = {name: values[-1] for name, values in accuracies.items()}
    run.summarise({"step": steps[-1], "accuracy": last, "profile": profiles[-1]})
    print(table(profiles[-1]))
    print(f"{title}: step {steps[-1]}, accuracy " + ", ".join(f"{value:.1%} {name}" for name, value in last.items()))


_NAMES = {"mlp": "perceptron", "resnet": "ResNet-18", "vit": "vision transformer"}


if __name__ == "__main__":
    main(variant_of(MODELS, sys.argv[1:]))
