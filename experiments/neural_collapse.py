"""Measure neural collapse past zero training error: NC1 to NC4 and CDNV by epoch and layer, and parts of the loss.

    python experiments/neural_collapse.py                 # a perceptron and a ResNet-18 on digits: 6 min on 2 cores
    python experiments/neural_collapse.py --models mlp    # only the perceptron: 1 to 2 min
    python experiments/neural_collapse.py --models resnet --data cifar10 --data-dir ~/data --resnet-width 64

Each network is trained with cross-entropy, and anew with half the squared error against one-hot targets. Training is by
SGD with momentum and weight decay λ on all parameters; the rate falls to a tenth after a half and again after three
quarters of the epochs. At epochs of equal ratios, the training set's features of every layer are streamed through
moments of the classes, with batch normalisation as it is used after training. The head's mean squared error, with ½λ of
its squared norm, is split into what the features and what the head cost (the central path).

NC1 to NC4 and CDNV are 0 in a fully collapsed network.

Writes to `runs/neural_collapse/<name>/`: `config.json`, `metrics.jsonl` (a line a measurement, with all layers),
`checkpoints/` (Orbax), `figure.png` and `summary.json`. Killed at any moment, the same command with --resume goes on,
and ends with the same metrics to the last bit.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from flatjax import cross_entropy
from flatjax.collapse import LayerMoments, central_path, init_layers, layer_reports, nc4, update_layers
from flatjax.layers.names import in_forward_order
from flatjax.models import MLP, ResNet18
from flatjax.run.options import SeedOptions, check_least
from flatjax.run.records import Record, RunFolder
from harness.data import images
from harness.data.images import Images
from harness.neural_collapse.figures import Case, draw
from harness.results.milestones import first_step_at_least
from harness.training.classifiers import (
    Classifier,
    LossOfSamples,
    State,
    at_equal_ratios,
    evaluating,
    in_batches,
    network_of,
    train_and_measure,
    training,
)
from harness.training.convolutions import by_products

Model = Literal["mlp", "resnet"]
Loss = Literal["cross_entropy", "squared_error"]


@dataclasses.dataclass(frozen=True)
class Config(SeedOptions):
    """Train networks past zero error, and measure how their features and heads collapse."""

    models: tuple[Model, ...] = get_args(Model)
    """Networks to train: a perceptron of ReLU layers, and a ResNet-18."""
    losses: tuple[Loss, ...] = get_args(Loss)
    """Losses to train with."""
    data: images.Name = "digits"
    """Images to classify; all but the digits are read from `data_dir`."""
    data_dir: Path | None = None
    """Folder of the data's files, as they are published."""
    num_train: int | None = None
    """Number of images to train on; by default all."""
    mlp_width: int = 128
    """Width of each hidden layer of the perceptron."""
    mlp_depth: int = 4
    """Number of hidden layers of the perceptron."""
    resnet_width: int = 8
    """Width of the ResNet's first stage."""
    mlp_epochs: int = 500
    """Number of training epochs of the perceptron."""
    resnet_epochs: int = 80
    """Number of training epochs of the ResNet."""
    learning_rate: float = 0.05
    """Initial learning rate of SGD with momentum 0.9."""
    mlp_weight_decay: float = 5e-4
    """Weight decay λ of the perceptron, added to the gradient, on all parameters."""
    resnet_weight_decay: float = 5e-3
    """Weight decay λ of the ResNet, added to the gradient, on all parameters."""
    batch_size: int = 128
    """Number of images per step."""
    measurements: int = 16
    """Number of measurements, at equal ratios of the epoch, and before the first."""
    measure_batch: int = 256
    """Number of images at a time while features are streamed."""
    covariance_up_to: int = 512
    """NC1 is measured for layers of at most this many features, and for what enters the head."""
    checkpoint_every: int = 20
    """Epochs between two checkpoints; each measurement leaves a checkpoint too."""
    folder: Path = Path("runs/neural_collapse")

    may_differ = frozenset({"data_dir", "losses", "models", "seed", "seeds"})

    def __post_init__(self):
        sizes = ("mlp_width", "mlp_depth", "resnet_width", "mlp_epochs", "resnet_epochs", "batch_size")
        check_least(self, 1, *sizes, "measurements", "measure_batch", "checkpoint_every", "seeds")

    @property
    def default_name(self) -> str:
        return self.data

    def epochs(self, model: Model) -> int:
        return self.mlp_epochs if model == "mlp" else self.resnet_epochs

    def weight_decay(self, model: Model) -> float:
        return self.mlp_weight_decay if model == "mlp" else self.resnet_weight_decay


def main(config: Config) -> None:
    """Train every network with every loss and seed, draw the figure and print the tables."""
    run = config.open_run()
    seeds = config.all_seeds
    started = time.monotonic()
    for seed in seeds:
        for model in config.models:
            train(config, model, seed, run)
    report(config, run, seeds)
    print(f"{time.monotonic() - started:.0f} s. The figure is {run.path / 'figure.png'}")


def train(config: Config, model: Model, seed: int, run: RunFolder) -> None:
    """Train one network with each loss from its last checkpoint to its end, and measure on the way."""
    train_set, test_set = images.load(config.data, config.data_dir, seed)
    train_set = train_set.some(config.num_train, seed)
    steps_an_epoch = max(1, len(train_set.labels) // config.batch_size)
    epochs = at_equal_ratios(config.epochs(model), config.measurements)
    of_training = optimizer(config, model, config.epochs(model) * steps_an_epoch)
    network, start = initial(config, model, seed, train_set, of_training)
    measure = measuring(config, network, config.weight_decay(model), train_set, test_set)
    for loss in config.losses:
        evaluate = evaluating(network, LOSSES[loss], {"train": train_set, "test": test_set})
        train_and_measure(
            run,
            {"model": model, "loss": loss, "seed": seed},
            jax.tree.map(jnp.copy, start),
            training(network, LOSSES[loss], of_training, train_set, batch_size=config.batch_size, seed=seed),
            lambda state, step, evaluate=evaluate: {"epoch": step // steps_an_epoch} | evaluate(state) | measure(state),
            steps_measured={epoch * steps_an_epoch for epoch in epochs},
            checkpoint_every=config.checkpoint_every * steps_an_epoch,
        )


def squared_error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return ½‖z − y‖² of each sample, with y one-hot."""
    return jnp.sum((logits - jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)) ** 2, axis=1) / 2


LOSSES: dict[Loss, LossOfSamples] = {"cross_entropy": cross_entropy, "squared_error": squared_error}


def optimizer(config: Config, model: Model, num_steps: int) -> optax.GradientTransformation:
    drops = {num_steps // 2: 0.1, 3 * num_steps // 4: 0.1}
    rate = optax.piecewise_constant_schedule(config.learning_rate, drops)
    return optax.chain(optax.add_decayed_weights(config.weight_decay(model)), optax.sgd(rate, momentum=0.9))


def initial(
    config: Config, model: Model, seed: int, train_set: Images, optimizer: optax.GradientTransformation
) -> tuple[Classifier, State]:
    """Return the network, and the state that training starts from."""
    _, height, width, channels = train_set.pixels.shape
    rngs = nnx.Rngs(seed)
    if model == "mlp":
        hidden = [config.mlp_width] * config.mlp_depth
        made = MLP((height * width * channels, *hidden, images.NUM_CLASSES), rngs=rngs)
    else:
        made = ResNet18(images.NUM_CLASSES, channels_in=channels, width=config.resnet_width, rngs=rngs)
        made = by_products(made) if height <= _SMALL else made
    return network_of(made, train_set, optimizer, is_flat=model == "mlp")


_SMALL = 16
"""Images of this many pixels are small; for larger ones the compiler's own convolutions are faster."""


def layer_features(model: Any, x: jax.Array) -> dict[str, jax.Array]:
    """Return what leaves each layer or block, and last what enters the head."""
    feats = {"input": x}
    if isinstance(model, MLP):
        for i, layer in enumerate(model.layers):
            x = feats[f"layers/{i}"] = model.activation(layer(x))
        return feats
    x = feats["stem"] = jax.nn.relu(model.stem_norm(model.stem(x)))
    for i, block in enumerate(model.blocks):
        x = feats[f"blocks/{i}"] = block(x)
    return feats | {"pooled": jnp.mean(x, axis=(1, 2))}


def measuring(
    config: Config, network: Classifier, weight_decay: float, train_set: Images, test_set: Images
) -> Callable[[State], Record]:
    """Return a measurement of the collapse of what enters the head, and of every layer."""

    def features(state: State, pixels: jax.Array) -> dict[str, jax.Array]:
        return layer_features(network.model(state["params"], state["rest"]), network.inputs(pixels))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(moments: LayerMoments, state: State, pixels: jax.Array, labels: jax.Array) -> LayerMoments:
        return update_layers(moments, features(state, pixels), labels)

    def moments_of(state: State, part: Images, covariance_up_to: int) -> LayerMoments:
        batches = list(in_batches(part, config.measure_batch))
        moments = init_layers(
            jax.eval_shape(features, state, batches[0][0]), batches[0][1],
            num_classes=images.NUM_CLASSES, covariance_up_to=covariance_up_to,
        )  # fmt: skip
        for batch in batches:
            moments = update(moments, state, *batch)
        return moments

    @jax.jit
    def decisions(moments: LayerMoments, state: State, pixels: jax.Array, labels: jax.Array) -> Any:
        last = in_forward_order(list(moments))[-1]
        return nc4(moments[last], state["params"]["head"], features(state, pixels)[last], labels)

    @jax.jit
    def reports(moments: LayerMoments, head: Record) -> dict[str, Any]:
        return layer_reports(moments, {in_forward_order(list(moments))[-1]: head})

    split = jax.jit(functools.partial(central_path, weight_decay=weight_decay))

    def measure(state: State) -> Record:
        head = state["params"]["head"]
        moments = moments_of(state, train_set, config.covariance_up_to)
        reported = reports(moments, head)
        of_layers = {name: numbers(reported[name]) for name in in_forward_order(list(moments))}
        last = list(of_layers)[-1]
        of_batches = [decisions(moments, state, *batch) for batch in in_batches(train_set, config.measure_batch)]
        total = functools.reduce(lambda one, other: jax.tree.map(operator.add, one, other), of_batches)
        held_out = reports(moments_of(state, test_set, 0), head)[last]
        parts = split(moments[last], head)
        return {
            **of_layers[last],
            "nc4": float(total.share),
            "test_cdnv": float(held_out.cdnv),
            **{f"squared_error_{name}": float(value) for name, value in parts._asdict().items()},
            "layers": of_layers,
        }

    return measure


def numbers(report: Any) -> Record:
    return {name: value.item() for name, value in report._asdict().items() if value is not None}


def report(config: Config, run: RunFolder, seeds: range) -> None:
    """Write the tables, the figure and the summary."""
    cases, summary = [], {}
    for model in config.models:
        for loss in config.losses:
            of_seeds = [
                [record for record in run.records if (record["model"], record["loss"], record["seed"]) == key]
                for key in ((model, loss, seed) for seed in seeds)
            ]
            fitted = [zero_error(records) for records in of_seeds]
            name = f"{_NAMES[model]}, {_NAMES[loss]}"
            cases.append(Case(name, of_seeds, fitted, squared_error=loss == "squared_error"))
            summary[f"{model}-{loss}"] = {
                str(seed): {"zero_error": epoch, "last": records[-1]}
                for seed, epoch, records in zip(seeds, fitted, of_seeds, strict=True)
            }
            print(f"\n{name}\n{table(of_seeds, fitted)}")
    run.summarise(summary)
    draw(
        run.path / "figure.png",
        cases,
        f"Neural collapse on {config.data}, {len(seeds)} {'seeds' if len(seeds) > 1 else 'seed'}",
    )


_NAMES = {
    "mlp": "perceptron",
    "resnet": "ResNet-18",
    "cross_entropy": "cross-entropy",
    "squared_error": "squared error",
}

_IN_TABLE = {
    "error, trained on": lambda record: 1 - record["train_accuracy"],
    "error, held out": lambda record: 1 - record["test_accuracy"],
    "NC1, 0 is collapsed": lambda record: record["nc1"],
    "CDNV, trained on, 0 is collapsed": lambda record: record["cdnv"],
    "CDNV, held out, 0 is collapsed": lambda record: record["test_cdnv"],
    "NC2 equinorm of means, 0 is collapsed": lambda record: record["nc2_equinorm_means"],
    "NC2 equiangularity of means, 0 is collapsed": lambda record: record["nc2_equiangularity_means"],
    "NC3, 0 is collapsed": lambda record: record["nc3"],
    "NC4, 0 is collapsed": lambda record: record["nc4"],
    "L_NC1": lambda record: record["squared_error_nc1"],
    "L_NC2/3": lambda record: record["squared_error_nc2_and_nc3"],
    "L_⊥": lambda record: record["squared_error_perpendicular"],
}


def zero_error(records: list[Record]) -> int | None:
    """Return the first measured epoch without an error on the training set."""
    return first_step_at_least(
        [record["epoch"] for record in records], [record["train_accuracy"] for record in records], 1.0
    )


def table(of_seeds: list[list[Record]], fitted: list[int | None]) -> str:
    """Format medians over seeds: before training, at the first epoch without a training error, and at the end."""
    at = {"at first": [records[0] for records in of_seeds]}
    if None not in fitted:
        at["at zero error"] = [
            next(record for record in records if record["epoch"] == epoch)
            for records, epoch in zip(of_seeds, fitted, strict=True)
        ]
    at["at last"] = [records[-1] for records in of_seeds]
    width = max(map(len, _IN_TABLE))
    epochs = "".join(f"{np.median([record['epoch'] for record in records]):>15.0f}" for records in at.values())
    lines = [f"{'':{width}}" + "".join(f"{name:>15}" for name in at), f"{'epoch':{width}}{epochs}"]
    for name, value in _IN_TABLE.items():
        # A measure without a value is null in a record.
        values = [np.median(np.array([value(record) for record in records], float)) for records in at.values()]
        lines.append(f"{name:{width}}" + "".join(f"{each:>15.3g}" for each in values))
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Config))
