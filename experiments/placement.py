"""Measure which layers of a network are flat: κ of every layer, with its standard error, over training.

    python experiments/placement.py                   # a perceptron on scikit-learn's digits: about 1 min on 2 cores
    python experiments/placement.py --model vit       # 2 to 3 min
    python experiments/placement.py --model resnet --data cifar10 --data-dir ~/data --width 64 --num-train 50000

κ is that of a fixed part of what is trained on, streamed in batches, with batch normalisation as it is used after
training: the running statistics are constants. The network is trained by AdamW, without augmentation.

Writes to `runs/placement/<name>/`: `config.json`, `metrics.jsonl` (a line a measurement, with the whole profile),
`checkpoints/` (Orbax), `profile.png` (the end), `history.png` (over training) and `summary.json`. Killed at any moment,
the same command with --resume goes on, and ends with the same metrics to the last bit.
"""

import dataclasses
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from harness import images
from harness.classifiers import (
    Network,
    State,
    at_equal_ratios,
    evaluating,
    in_batches,
    network_of,
    train_and_measure,
    training,
)
from harness.images import Images
from harness.options import check_least
from harness.profiles import Profile, draw_history, draw_profile, from_record, in_forward_order, over_seeds, table
from harness.profiles import to_record as profile_record
from harness.runs import Record, RunFolder

from flatjax import cross_entropy, flatness_profile
from flatjax.layers.kernels import find_layers
from flatjax.models import MLP, ResNet18, ViT


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network, and measure relative flatness of all its layers on the way."""

    model: Literal["mlp", "resnet", "vit"] = "mlp"
    """Network to train: a perceptron, a ResNet-18, or a vision transformer with patches a quarter of the image wide."""
    data: images.Name = "digits"
    """Images to classify; all but the digits are read from `data_dir`."""
    data_dir: Path | None = None
    """Folder of the data's files, as they are published."""
    num_train: int | None = None
    """Number of images to train on; by default all."""
    width: int = 0
    """Width of the hidden layers, of the first stage, or of the residual stream; 0 stands for 128, 8 and 32."""
    depth: int = 0
    """Number of hidden layers of a perceptron (0 stands for 4) or of blocks of a transformer (0 stands for 2)."""
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
    measurements: int = 0
    """Number of measurements, at equal ratios of the step, and before the first; 0 stands for 20 with a perceptron, 10
    with others."""
    measure_on: int = 0
    """Number of training images that κ is measured on; 0 stands for 512 with a perceptron, 128 with others."""
    measure_batch: int = 256
    """Number of these images that are measured at a time."""
    evaluate_on: int = 10_000
    """Largest number of images for loss and accuracy, of the training set and of the test set each."""
    num_probes: int = 16
    """Least number of probes per layer and batch."""
    max_probes: int = 0
    """Largest number of probes per layer and batch; 0 stands for 128 with a perceptron, 24 with others."""
    relative_error: float | None = 0.1
    """Probes are added until the standard error is this share of κ, for every layer."""
    route: Literal["layerwise", "joint"] | None = None
    """Route to κ: one product per layer and probe (the perceptron's default), or one for all layers, noisier but
    compiled once."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; each measurement leaves a checkpoint too."""
    seed: int = 0
    """First seed; it decides the choice of images, the initial weights, the batches and the probes."""
    seeds: int = 1
    """Number of seeds to run, from `seed` on."""
    name: str | None = None
    """Name of the run's folder; by default the model and the data."""
    folder: Path = Path("runs/placement")
    """Folder that holds the folders of all runs."""
    resume: bool = False
    """Continue the run of this name where it stopped."""

    def __post_init__(self):
        if self.depth and self.model == "resnet":
            raise SystemExit(f"--depth is {self.depth}, but --model resnet has 18 layers")
        if self.model == "vit" and self.width % _HEADS:
            raise SystemExit(f"--width is {self.width}, wanted a multiple of the {_HEADS} heads of --model vit")
        check_least(self, 1, "steps", "batch_size", "measure_batch", "evaluate_on", "checkpoint_every", "seeds")
        check_least(self, 1, "width", "depth", "measurements", "measure_on", "max_probes", or_zero=True)


_HEADS = 4
_COSTLY: Record = {"measurements": 10, "measure_on": 128, "max_probes": 24, "route": "joint"}
_DEFAULTS: dict[str, Record] = {
    "mlp": {"width": 128, "depth": 4, "measurements": 20, "measure_on": 512, "max_probes": 128, "route": "layerwise"},
    "resnet": {"width": 8, **_COSTLY},
    "vit": {"width": 32, "depth": 2, **_COSTLY},
}


def main(config: Config) -> None:
    """Run every seed, draw the figures, and print the last profile."""
    config = with_defaults(config)
    recorded = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_OF_THE_RUN}
    name = config.name or f"{config.model}-{config.data}"
    run = RunFolder(config.folder / name, recorded, resume=config.resume)
    seeds = range(config.seed, config.seed + config.seeds)
    started = time.monotonic()
    for seed in seeds:
        train(config, seed, run)
    curves = [[record for record in run.records if record["seed"] == seed] for seed in seeds]
    report(config, run, curves)
    print(f"{time.monotonic() - started:.0f} s. The figures are in {run.path}")


_NOT_OF_THE_RUN = {"resume", "name", "folder", "data_dir", "seeds", "seed"}
"""These options may differ when a run is resumed; its seeds are in its records."""


def with_defaults(config: Config) -> Config:
    """Fill in what depends on the model."""
    defaults = {name: value for name, value in _DEFAULTS[config.model].items() if not getattr(config, name)}
    return dataclasses.replace(config, **defaults)


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


def initial(config: Config, seed: int, train_set: Images) -> tuple[Network, State]:
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


def measuring(config: Config, network: Network, seed: int, train_set: Images, test_set: Images):
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
        return evaluate(state) | {"profile": profile_record(profile)}

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
    run.summarise({"step": steps[-1], "accuracy": last, "profile": profile_record(profiles[-1])})
    print(table(profiles[-1]))
    print(f"{title}: step {steps[-1]}, accuracy " + ", ".join(f"{value:.1%} {name}" for name, value in last.items()))


_NAMES = {"mlp": "perceptron", "resnet": "ResNet-18", "vit": "vision transformer"}


if __name__ == "__main__":
    main(tyro.cli(Config))
