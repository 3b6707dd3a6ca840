"""Which layers of a network are flat? Relative flatness κ of every layer, with its standard error, over training.

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
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from harness import images
from harness.batches import batch_at
from harness.checkpoints import checkpointer, load_latest
from harness.images import Images
from harness.profiles import Profile, draw_history, draw_profile, from_record, in_forward_order, over_seeds, table
from harness.profiles import to_record as profile_record
from harness.progress import Progress
from harness.runs import Record, RunFolder

from flatjax import cross_entropy, flatness_profile
from flatjax.layers.kernels import find_layers
from flatjax.models import MLP, ResNet18, ViT

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network, and measure relative flatness of all its layers along the way."""

    model: Literal["mlp", "resnet", "vit"] = "mlp"
    """A perceptron, a ResNet-18, or a vision transformer of patches a quarter of the image wide."""
    data: images.Name = "digits"
    """What to classify. All but the digits are read from `data_dir`."""
    data_dir: Path | None = None
    """The folder of the data's files, as they are published."""
    num_train: int | None = None
    """How many images to train on; by default all."""
    width: int = 0
    """Of the hidden layers, of the first stage, or of the residual stream; 0 is 128, 8 and 32."""
    depth: int = 0
    """Hidden layers of a perceptron, 0 is 4, or blocks of a transformer, 0 is 2."""
    activation: Literal["relu", "tanh", "gelu"] = "gelu"
    """Of a perceptron."""
    learning_rate: float = 1e-3
    """Of AdamW, reached in `warmup` steps."""
    warmup: int = 50
    """Steps."""
    weight_decay: float = 0.01
    """Of AdamW, decoupled, on all parameters."""
    batch_size: int = 128
    """Images a step."""
    steps: int = 3000
    """Of training."""
    measurements: int = 0
    """At equal ratios of the step, and before the first; 0 is 20 of a perceptron, 10 of others."""
    measure_on: int = 0
    """Images of those trained on that κ is measured on; 0 is 512 of a perceptron, 128 of others."""
    measure_batch: int = 256
    """Of them at a time."""
    evaluate_on: int = 10_000
    """At most so many images for loss and accuracy, of those trained on and of those held out."""
    num_probes: int = 16
    """Of a layer and batch, at least."""
    max_probes: int = 0
    """Of a layer and batch, at most; 0 is 128 of a perceptron, 24 of others."""
    relative_error: float | None = 0.1
    """Probes are added until the standard error is this share of κ, for every layer."""
    route: Literal["layerwise", "joint"] | None = None
    """A product a layer and probe, the perceptron's default, or one for all layers, noisier but compiled once."""
    checkpoint_every: int = 500
    """Steps; each measurement leaves a checkpoint too."""
    seed: int = 0
    """Of the choice of images, the initial weights, the batches and the probes."""
    seeds: int = 1
    """How many seeds to run, from `seed` on."""
    name: str | None = None
    """Of the run's folder; made of the model and the data by default."""
    folder: Path = Path("runs/placement")
    """Where the runs' folders are."""
    resume: bool = False
    """Continue the run of this name where it was left."""

    def __post_init__(self):
        if self.depth and self.model == "resnet":
            raise SystemExit(f"--depth is {self.depth}, but --model resnet has 18 layers")
        if self.model == "vit" and self.width % _HEADS:
            raise SystemExit(f"--width is {self.width}, wanted a multiple of the {_HEADS} heads of --model vit")
        for name in ("steps", "batch_size", "measure_batch", "evaluate_on", "checkpoint_every", "seeds"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name.replace('_', '-')} is {getattr(self, name)}, wanted at least 1")
        for name in ("width", "depth", "measurements", "measure_on", "max_probes"):
            if getattr(self, name) < 0:
                raise SystemExit(f"--{name.replace('_', '-')} is {getattr(self, name)}, wanted at least 1, or 0")


_HEADS = 4
_COSTLY: Record = {"measurements": 10, "measure_on": 128, "max_probes": 24, "route": "joint"}
_DEFAULTS: dict[str, Record] = {
    "mlp": {"width": 128, "depth": 4, "measurements": 20, "measure_on": 512, "max_probes": 128, "route": "layerwise"},
    "resnet": {"width": 8, **_COSTLY},
    "vit": {"width": 32, "depth": 2, **_COSTLY},
}


def main(config: Config) -> None:
    """Runs every seed, draws the figures, and prints the last profile."""
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
"""Options that may differ when a run is resumed; its seeds are in its records."""


def with_defaults(config: Config) -> Config:
    """What depends on the model."""
    defaults = {name: value for name, value in _DEFAULTS[config.model].items() if not getattr(config, name)}
    return dataclasses.replace(config, **defaults)


class Network(NamedTuple):
    """A model's structure as it is trained and as it is used, which differ in batch normalisation alone."""

    in_training: nnx.GraphDef
    in_use: nnx.GraphDef
    mean: jax.Array
    """(1, 1, 1, c), of the channels of what is trained on."""
    deviation: jax.Array
    is_flat: bool
    """The model takes vectors."""

    def inputs(self, pixels: jax.Array) -> jax.Array:
        x = (pixels.astype(jnp.float32) - self.mean) / self.deviation
        return x.reshape(len(x), -1) if self.is_flat else x


def train(config: Config, seed: int, run: RunFolder) -> None:
    """Trains one seed from where it was left to its end, and measures at the steps of `measured_at`."""
    train_set, test_set = images.load(config.data, config.data_dir, seed)
    train_set = train_set.some(config.num_train, seed)
    network, state = initial(config, seed, train_set)
    train_some = training(config, network, seed, train_set)
    measure = measuring(config, network, seed, train_set, test_set)
    steps_measured = measured_at(config)
    stops = sorted({*steps_measured, *range(0, config.steps, config.checkpoint_every)})
    with checkpointer(run.path / "checkpoints" / f"seed-{seed}") as checkpoints:
        step, state = load_latest(checkpoints, state)
        run.keep(lambda record: record["seed"] != seed or record["step"] <= step)
        left = {
            "step": config.steps - max(step, 0),
            "measurement": sum(each > step for each in steps_measured),
        }
        with Progress(f"seed {seed}", left) as progress:
            for stop in (each for each in stops if each > step):
                if stop:
                    state = jax.block_until_ready(train_some(state, max(step, 0), stop))
                    progress.done("step", stop - max(step, 0))
                step = stop
                if step in steps_measured:
                    record = {"seed": seed, "step": step} | measure(state, step)
                    run.append(record)
                    progress.done("measurement", note=f"accuracy {record['test_accuracy']:.1%} held out")
                checkpoints.save(step, state)


def measured_at(config: Config) -> set[int]:
    """0, and steps from 1 to the last at equal ratios, rounded; fewer where they meet."""
    return {0, *np.round(np.geomspace(1, config.steps, config.measurements)).astype(int).tolist(), config.steps}


def initial(config: Config, seed: int, train_set: Images) -> tuple[Network, State]:
    """The network; its parameters, running statistics and the optimizer's state."""
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
    model.train()
    in_training = nnx.graphdef(model)
    model.eval()
    in_use, params, rest = nnx.split(model, nnx.Param, ...)
    params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
    network = Network(in_training, in_use, *moments(train_set.pixels), is_flat=config.model == "mlp")
    return network, {"params": params, "rest": rest, "optimizer": optimizer(config).init(params)}


def moments(pixels: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of each channel, from how often each of the 256 values occurs."""
    values = np.arange(256)
    counts = [np.bincount(channel.ravel(), minlength=256) for channel in np.moveaxis(pixels, -1, 0)]
    means = np.array([np.average(values, weights=count) for count in counts])
    variances = [np.average((values - mean) ** 2, weights=count) for mean, count in zip(means, counts, strict=True)]
    mean, deviation = (jnp.asarray(each, jnp.float32)[None, None, None, :] for each in (means, np.sqrt(variances)))
    return mean, deviation


def optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0, config.learning_rate, config.warmup)
    return optax.adamw(schedule, weight_decay=config.weight_decay)


def training(config: Config, network: Network, seed: int, train_set: Images):
    """Training from a step to another, compiled once."""
    num_train = len(train_set.labels)
    batch_size = min(config.batch_size, num_train)
    batch_key = jax.random.fold_in(jax.random.key(seed), 0)

    def loss(params: State, rest: State, pixels: jax.Array, labels: jax.Array) -> tuple[jax.Array, State]:
        model = nnx.merge(network.in_training, params, rest, copy=True)
        logits = model(network.inputs(pixels))
        _, _, renewed = nnx.split(model, nnx.Param, ...)
        return cross_entropy(logits, labels).mean(), nnx.to_pure_dict(renewed)

    def one_step(step: jax.Array, state: State, pixels: jax.Array, labels: jax.Array) -> State:
        chosen = batch_at(batch_key, step, num_train, batch_size)
        grads, rest = jax.grad(loss, has_aux=True)(state["params"], state["rest"], pixels[chosen], labels[chosen])
        updates, optimizer_state = optimizer(config).update(grads, state["optimizer"], state["params"])
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


def measuring(config: Config, network: Network, seed: int, train_set: Images, test_set: Images):
    """Loss and accuracy on both parts, and the profile on a fixed part of what is trained on."""

    def logits(params: State, pixels: jax.Array, rest: State) -> jax.Array:
        return nnx.merge(network.in_use, params, rest)(network.inputs(pixels))

    def loss(params: State, pixels: jax.Array, labels: jax.Array, rest: State) -> jax.Array:
        return cross_entropy(logits(params, pixels, rest), labels).mean()

    @jax.jit
    def sums(state: State, pixels: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        outputs = logits(state["params"], pixels, state["rest"])
        right = jnp.sum(jnp.argmax(outputs, axis=1) == labels)
        return {"loss": cross_entropy(outputs, labels).sum(), "accuracy": right}

    probe_key = jax.random.fold_in(jax.random.key(seed), 1)
    evaluated = {
        "train": train_set.some(config.evaluate_on, seed),
        "test": test_set.some(config.evaluate_on, seed),
    }
    profiled = list(in_batches(train_set.some(config.measure_on, seed), config.measure_batch))

    def measure(state: State, step: int) -> Record:
        record: Record = {}
        for part, chosen in evaluated.items():
            totals = [sums(state, *batch) for batch in in_batches(chosen, _EVALUATED_AT_A_TIME)]
            for name in totals[0]:
                record[f"{part}_{name}"] = sum(float(total[name]) for total in totals) / len(chosen.labels)
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
        return record | {"profile": profile_record(profile)}

    return measure


_EVALUATED_AT_A_TIME = 500


def in_batches(chosen: Images, size: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    for start in range(0, len(chosen.labels), size):
        yield jnp.asarray(chosen.pixels[start : start + size]), jnp.asarray(chosen.labels[start : start + size])


def report(config: Config, run: RunFolder, curves: list[list[Record]]) -> None:
    """The table of the last profile, the figures, and the summary; over the seeds, if there are several."""
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
