"""Compare κ with the usual regularisers, on digits with few or wrong labels, to see whether flatness helps.

    python experiments/regularise.py                  # about half an hour on 2 cores
    python experiments/regularise.py --models mlp     # only the perceptron

Two networks, a perceptron and a ResNet-18, learn from 100 images, and from 500 of which 40 % have a wrong label, by SGD
with momentum: plainly; with weight decay, label smoothing, a penalty on confidence, SAM or ASAM; or with relative
flatness κ of the head, or its simplified form κ̂, as part of the loss.

Each method is tuned on the same number of settings, learning rate × strength. What counts is the accuracy on validation
images, whose labels are right, over seeds that are not used again. The baseline has no strength, and is given as many
learning rates as others have settings. The best setting is trained anew with 10 other seeds. A seed chooses the images
to train on, the wrong labels, the initial weights and the batches; the test images are always the same, and nothing is
tuned on them.

Writes to `runs/regularise/<name>/`: `config.json`, `metrics.jsonl` (a line a setting, with all its seeds), `figure.png`
and `summary.json`. Killed at any moment, the same command with --resume goes on, and ends with the same metrics.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
import tyro

from flatjax.models import MLP, ResNet18
from flatjax.run.options import RunOptions, check_least
from flatjax.run.progress import Progress
from flatjax.run.records import Record, RunFolder, number
from harness.benchmarks.timing import side_by_side
from harness.data import few_labels
from harness.data.batches import all_batches
from harness.data.few_labels import Task
from harness.regularise.comparison import Row, draw, table
from harness.results.intervals import interval, is_clear
from harness.training.convolutions import by_products
from harness.training.regularisers import REGULARISERS, Method
from harness.training.small_networks import PARTS, Programs, TrainedNetwork, Trial, network

Model = Literal["mlp", "resnet"]
TaskName = Literal["few", "wrong"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A grid holds the learning rates to try, and the strengths for each."""

    lowest_rate: float
    """Lowest learning rate to try."""
    highest_rate: float
    """Highest learning rate to try."""
    num_rates: int
    """Number of learning rates, at equal ratios."""
    num_strengths: int
    """Number of strengths, at equal ratios over three decades. The baseline gets this many times as many learning rates
    instead."""

    @property
    def size(self) -> int:
        return self.num_rates * self.num_strengths


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Compare relative flatness as a regulariser with others, each tuned alike."""

    models: tuple[Model, ...] = ("mlp", "resnet")
    """Networks to train: a perceptron of two hidden layers, and a ResNet-18 with batch normalisation."""
    tasks: tuple[TaskName, ...] = ("few", "wrong")
    """Tasks to learn: few labels, or more labels of which some are wrong."""
    methods: tuple[Method, ...] = get_args(Method)
    """Methods to compare; the baseline is one of them."""
    num_few: int = 100
    """Number of images to learn from with few labels, equally many of each class."""
    num_wrong: int = 500
    """Number of images to learn from when some labels are wrong."""
    noise: float = 0.4
    """Share of these images with a wrong label."""
    num_validation: int = 300
    """Number of validation images to tune on."""
    width: int = 128
    """Width of the perceptron's hidden layers."""
    resnet_width: int = 8
    """Number of channels of the ResNet's first stage."""
    steps: int = 300
    """Number of training steps."""
    batch_size: int = 50
    """Number of images per step."""
    mlp: Grid = Grid(0.002, 0.2, 5, 7)
    """Settings to try with the perceptron."""
    resnet: Grid = Grid(0.02, 0.2, 3, 4)
    """Settings to try with the ResNet."""
    tuning_seeds: int = 3
    """Number of seeds that each setting is tried with."""
    seeds: int = 10
    """Number of other seeds that the best setting is trained with."""
    timing_seconds: float = 10.0
    """Least time, in seconds, for which a step is timed."""
    folder: Path = Path("runs/regularise")

    may_differ = frozenset({"methods", "models", "tasks"})

    def __post_init__(self):
        if "baseline" not in self.methods:
            raise SystemExit(f"--methods is {' '.join(self.methods)}, wanted baseline among them, to compare with")
        check_least(self, 1, "steps", "batch_size", "tuning_seeds", "seeds")
        if self.tuning_seeds > _FINAL - _TUNING:
            raise SystemExit(f"--tuning-seeds is {self.tuning_seeds}, wanted at most {_FINAL - _TUNING}")
        for grid in (self.mlp, self.resnet):
            check_least(grid, 2, "num_rates", "num_strengths")

    @property
    def default_name(self) -> str:
        return "digits"

    def grid(self, model: Model) -> Grid:
        return {"mlp": self.mlp, "resnet": self.resnet}[model]

    @property
    def drawn(self) -> dict[TaskName, Task]:
        return {"few": Task(self.num_few, 0.0), "wrong": Task(self.num_wrong, self.noise)}


MODEL_NAMES: dict[str, str] = {"mlp": "perceptron", "resnet": "ResNet-18"}


def main(config: Config) -> None:
    """Tune and train whatever is not in the records yet, and report."""
    run = config.open_run()
    started = time.monotonic()
    for model in config.models:
        compare(config, model, run)
    report(config, run)
    print(f"{time.monotonic() - started:.0f} s. The figure is {run.path / 'figure.png'}")


Setting = tuple[float, float | None]
"""A setting is a learning rate and a strength."""


def settings(config: Config, model: Model, method: Method) -> list[Setting]:
    """List the settings from slow to fast and from weak to strong, equally many for each method."""
    grid, ends = config.grid(model), REGULARISERS[method].strengths
    strengths = [None] if ends is None else np.geomspace(*ends, grid.num_strengths).tolist()
    rates = np.geomspace(grid.lowest_rate, grid.highest_rate, grid.size // len(strengths)).tolist()
    return list(itertools.product(rates, strengths))


def seeds_of(config: Config, phase: str) -> range:
    """Return the seeds of a phase.

    Tuning and the end have no seeds in common, nor with those that the networks were tried out on.
    """
    first, number = (_TUNING, config.tuning_seeds) if phase == "tuning" else (_FINAL, config.seeds)
    return range(first, first + number)


_TUNING, _FINAL = 1000, 2000


def compare(config: Config, model: Model, run: RunFolder) -> None:
    """Tune each method on each task, train it in its best setting, and time a step of each."""
    digits = few_labels.digits()
    of_digits = network_of(config, model, digits.pixels.shape)
    programs = Programs(of_digits, inputs(model, digits.pixels), config.steps)
    cases = [(task, method) for task in config.tasks for method in config.methods]
    left = sum(
        len(seeds_of(config, phase)) * (number - len(of_case(run, phase, model, task, method)))
        for task, method in cases
        for phase, number in (("tuning", config.grid(model).size), ("final", 1))
    )
    with Progress(MODEL_NAMES[model], {"network": left}) as progress:
        for task, method in cases:
            train = functools.partial(train_some, config, programs, digits.labels, progress, task, method)
            case = {"model": model, "task": task, "method": method}
            fill(
                config,
                run,
                {"phase": "tuning", **case},
                settings(config, model, method),
                train,
                programs.parallel.size,
            )
            best = best_of(of_case(run, "tuning", **case))
            chosen = [(best["learning_rate"], best["strength"])]
            fill(config, run, {"phase": "final", **case}, chosen, train, programs.parallel.size)
    if not set(config.methods) <= {record["method"] for record in of_case(run, "timing", model)}:
        run.keep(lambda record: record["phase"] != "timing" or record["model"] != model)
        for record in time_a_step(config, programs, digits.labels):
            run.append({"phase": "timing", "model": model} | record)


def train_some(
    config: Config,
    programs: Programs,
    labels: np.ndarray,
    progress: Progress,
    task: TaskName,
    method: Method,
    chosen: list[tuple[Setting, int]],
) -> list[Record]:
    """Train networks of some settings and seeds, and return what is measured of them."""
    trials = [trial(config, programs.network, labels, task, setting, seed) for setting, seed in chosen]
    results = programs.run(REGULARISERS[method], trials)
    progress.done("network", len(trials), f"{describe(config, task)}, {REGULARISERS[method].name}")
    return results


def fill(
    config: Config,
    run: RunFolder,
    key: Record,
    chosen: list[Setting],
    train: Callable[[list[tuple[Setting, int]]], list[Record]],
    at_a_time: int,
) -> None:
    """Add a record for each setting that has none, once all its seeds are trained."""
    seeds = seeds_of(config, key["phase"])
    done = [(record["learning_rate"], record["strength"]) for record in of_case(run, **key)]
    todo = [setting for setting in chosen if setting not in done]
    trials = [(setting, seed) for setting in todo for seed in seeds]
    results: list[Record] = []
    for start in range(0, len(trials), at_a_time):
        results += train(trials[start : start + at_a_time])
        while len(results) >= len(seeds):
            (rate, strength), of_seeds = todo.pop(0), dict(zip(map(str, seeds), results, strict=False))
            if key["phase"] == "tuning":
                for each in of_seeds.values():
                    del each["test_accuracy"]  # nobody's business yet
            run.append(key | {"learning_rate": rate, "strength": strength, "seeds": of_seeds})
            del results[: len(seeds)]


def of_case(run: RunFolder, phase: str, model: str, task: str | None = None, method: str | None = None) -> list[Record]:
    """Return the records of a case, in the order of the settings."""
    wanted = {"phase": phase, "model": model, "task": task, "method": method}
    return [
        record
        for record in run.records
        if all(record.get(key) == value for key, value in wanted.items() if value is not None)
    ]


def network_of(config: Config, model: Model, shape: tuple[int, ...]) -> TrainedNetwork:
    _, height, width, channels = shape
    if model == "mlp":
        widths = (height * width * channels, config.width, config.width, few_labels.NUM_CLASSES)
        return network(lambda rngs: MLP(widths, rngs=rngs))
    options = {"channels_in": channels, "width": config.resnet_width}
    return network(lambda rngs: by_products(ResNet18(few_labels.NUM_CLASSES, **options, rngs=rngs)))


def inputs(model: Model, pixels: np.ndarray) -> np.ndarray:
    """Scale the images to mean 0 and variance 1 over all images and pixels."""
    x = ((pixels - pixels.mean()) / pixels.std()).astype(np.float32)
    return x.reshape(len(x), -1) if model == "mlp" else x


def trial(
    config: Config, network: TrainedNetwork, labels: np.ndarray, task: TaskName, setting: Setting, seed: int
) -> Trial:
    """Return all that a seed decides, together with the setting."""
    drawn = few_labels.draw(labels, config.drawn[task], config.num_validation, seed)
    parts = np.zeros(len(labels), np.int32)
    for place, part in enumerate(PARTS, start=1):
        parts[drawn.parts[part]] = place
    batches = all_batches(drawn.parts["train"], config.batch_size, config.steps, seed)
    rate, strength = (np.float32(each or 0.0) for each in setting)
    return Trial(network.start(seed), drawn.labels, parts, batches, rate, strength)


def best_of(tuned: list[Record]) -> Record:
    """Return the best setting by the mean accuracy on validation images over seeds; of equals the slowest and weakest.

    A setting of which a network diverged comes last.
    """
    return max(
        tuned, key=lambda record: -1.0 if np.isnan(mean := np.mean(over_seeds(record, "validation_accuracy"))) else mean
    )


def over_seeds(record: Record, name: str) -> list[float]:
    """Read the value of each seed from a record."""
    return [number(seed[name]) for seed in record["seeds"].values()]


def time_a_step(config: Config, programs: Programs, labels: np.ndarray) -> list[Record]:
    """Time a step of one network on one core or device, with all of them at work and every method in turn."""
    task = config.tasks[0]
    several = programs.parallel.stack(
        [trial(config, programs.network, labels, task, _TIMED_AT, seed) for seed in range(programs.parallel.size)]
    )
    end = min(_STEPS_TIMED, config.steps)
    calls: dict[str, Callable[[], Any]] = {
        method: functools.partial(programs.train, REGULARISERS[method], several, end) for method in config.methods
    }
    timings = side_by_side(calls, reference="baseline", min_seconds=config.timing_seconds)
    return [
        {
            "method": method,
            "seconds": timing.seconds / end,
            "ratio": timing.ratio,
            "ratio_quartiles": list(timing.ratio_quartiles),
        }
        for method, timing in timings.items()
    ]


_STEPS_TIMED, _TIMED_AT = 100, (1e-3, 1e-3)


def report(config: Config, run: RunFolder) -> None:
    """Write the tables, the figure and the summary."""
    rows = {
        (model, task): [row(config, run, model, task, method) for method in config.methods]
        for model in config.models
        for task in config.tasks
    }
    names = {(MODEL_NAMES[model], describe(config, task)): rows[model, task] for model, task in rows}
    for (model, task), of_panel in names.items():
        print(f"\n{model}, {task}\n{table(of_panel)}")
    gains = [each.gain for of_panel in rows.values() for each in of_panel if each.gain is not None]
    print(
        f"\n± is a 95 % interval over {config.seeds} seeds; the gain is over the baseline, seed by seed, and "
        f"{sum(map(is_clear, gains))} of {len(gains)} intervals leave out 0; if no method did anything, "
        f"{0.05 * len(gains):.1f} would.\n"
        "↓ and ↑: the lowest and the highest value tried was the best. A step is of one network on one core."
    )
    draw(
        run.path / "figure.png",
        names,
        f"Test accuracy, mean and 95 % interval of {config.seeds} seeds (orange: that of the gain leaves out 0)",
    )
    run.summarise({f"{model}-{task}": {each.name: each for each in rows[model, task]} for model, task in rows})


def describe(config: Config, task: TaskName) -> str:
    drawn = config.drawn[task]
    return f"{drawn.num_train} images" + (f", {drawn.noise:.0%} of labels wrong" if drawn.noise else "")


def row(config: Config, run: RunFolder, model: Model, task: TaskName, method: Method) -> Row:
    (final,) = of_case(run, "final", model, task, method)
    (baseline,) = of_case(run, "final", model, task, "baseline")
    (timing,) = of_case(run, "timing", model, method=method)
    accuracy, reference = (over_seeds(record, "test_accuracy") for record in (final, baseline))
    setting = {key: final[key] for key in ("learning_rate", "strength")}
    tried = dict(zip(setting, zip(*settings(config, model, method), strict=True), strict=True))
    return Row(
        name=REGULARISERS[method].name,
        setting=setting,
        edges={key: edge(setting[key], tried[key]) for key in setting},
        accuracy=interval(accuracy),
        gain=None if method == "baseline" else interval(np.subtract(accuracy, reference).tolist()),
        train_accuracy=interval(over_seeds(final, "train_accuracy")),
        train_loss=interval(over_seeds(final, "train_loss")),
        kappa=interval(over_seeds(final, "relative_flatness")),
        seconds=timing["seconds"],
        ratio=timing["ratio"],
    )


def edge(value: float | None, tried: tuple[float | None, ...]) -> str:
    """Say whether a value is at the end of those tried, beyond which a better one may be."""
    if value is None:
        return ""
    return {tried[0]: "lowest", tried[-1]: "highest"}.get(value, "")


if __name__ == "__main__":
    # A device a core: small networks on two cores are trained in half the time two at a time.
    jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))
    main(tyro.cli(Config))
