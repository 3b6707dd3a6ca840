"""Tell flatness from collapse: training drives either up, holds it at a level, or lets it go again.

    python experiments/interventions.py                        # x + y mod 23: about 20 min on 2 cores
    python experiments/interventions.py digits                 # about 5 min
    python experiments/interventions.py modular-full           # all controls, more strengths and levels: about 2 h
    python experiments/interventions.py cifar10 --data-dir ~/data --num-train 5000 --batch-size 500

Flatness is κ or κ̂ of the head (larger is sharper). Collapse is NCC, the class-distance variance summed over all
ordered pairs of classes (0 is collapsed). It is not the accuracy of nearest class centres.

In all arms features have at most the norm R, and the head has ‖W‖_F ≤ B (it is projected after every step). Both are
wider than the baseline ever reaches, so that it is not changed. Still they put a ceiling on what an arm can drive
up, and a run that sits at it is called so. All arms have the same seeds (a split or a choice of images, and initial
weights):

* pushed: the loss has λκ, λκ̂ or λNCC added, where λ < 0 drives it up. NCC has no maximum, as two class means may
  coincide: there something is added to squared distances.
* controls: the loss has a confidence penalty, label smoothing (as a term: cross-entropy with uniform labels, less that
  with the right ones) or weight decay added. The gradient of each is scaled at every step to the norm that the pushed
  arm's term has at the same parameters.
* held: the loss has μ(log q − log q*)² added, where q is κ, κ̂ or NCC of the training batch. This begins at a step at
  which the training set is fitted, and some of what is held out is right already.
* unplugged: the arm is pushed until a step, and then nothing else changes: neither the rate, nor the decay, nor the
  optimizer's state. The arm unplugged from the start is the baseline.

κ is measured alike in all arms and at all times: at temperature 1, with the features that the network uses. An arm that
does not fit its training set to 99 % is marked as not answering, and a network that diverged is marked as such.

Writes to `runs/interventions/<name>/`: `config.json`, `metrics.jsonl` (a line a seed and measurement), `checkpoints/`,
`summary.json`, `table.txt`, `training-….png`, `dose_response.png`, `delay.png`. Killed at any moment, the same command
with --resume goes on, and ends with the same metrics to the last bit.
"""

import dataclasses
import itertools
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import optax
import tyro

from flatjax.run.checkpoints import checkpointer, load_latest
from flatjax.run.options import SeedOptions, variant_of
from flatjax.run.progress import Progress
from flatjax.run.records import Record, RunFolder
from harness.interventions.arm_results import arm_results, table, to_summary
from harness.interventions.arms import BASELINE, QUANTITIES, Arm, Quantity, Rule, controls, held, pushed
from harness.interventions.bounds import Bounds
from harness.interventions.dose_response import dose_response_table, dose_responses
from harness.interventions.figures import draw_delays, draw_dose_response, draw_training
from harness.interventions.learners import Learner, image_classification, modular_addition
from harness.interventions.outcomes import diverged_at, generalized_at
from harness.interventions.training import SeedTrainer, Setting, State

Group = Literal["pushed", "controls", "held", "unplugged"]


@dataclasses.dataclass(frozen=True)
class Config(SeedOptions):
    """Drive flatness or collapse, hold them, or let them go, and see when the network generalizes."""

    task: tyro.conf.Suppress[Literal["modular", "digits", "mnist", "fashion-mnist", "cifar10"]] = "modular"
    """Task to learn: modular addition by a transformer, or images by a perceptron."""
    data_dir: Path | None = None
    """Folder of the images' files; the digits need none."""
    groups: tuple[Group, ...] = ("pushed", "controls", "held", "unplugged")
    """Groups of arms to train beside the baseline."""
    quantities: tuple[Quantity, ...] = QUANTITIES
    """Quantities to drive and to hold."""
    full: tyro.conf.Suppress[bool] = False
    """Run the controls of every strength."""
    modulus: int = 23
    """Modulus p of the modular task."""
    train_share: float = 0.8
    """Share of the modular equations that the network trains on."""
    num_train: int = 200
    """Number of images to train on."""
    num_held_out: int = 2000
    """Largest number of images to hold out; the digits have 359."""
    width: int = 32
    """Width of the network."""
    depth: int = 1
    """Number of blocks of the transformer, or of hidden layers of the perceptron."""
    learning_rate: float = 5e-3
    """Learning rate of AdamW."""
    weight_decay: float = 1.0
    """Decoupled weight decay of AdamW."""
    batch_size: int = 0
    """Samples per step; 0 stands for all, so that every class has its mean."""
    feature_norm: float = 100.0
    """Largest norm R of a sample's features."""
    head_norm: float = 10.0
    """Largest norm B of the head, ‖W‖_F."""
    sphere: bool = False
    """Give all features the norm R, as in the published interventions, where R = 1 and B = 50."""
    softness: float = 1e-3
    """Softening of NCC in pushed arms: this many times R² is added to the squared distance of two class means."""
    kappa_strengths: tuple[float, ...] = (-1e-4, -3e-5, 1e-2)
    """Strengths λ of κ, negative where κ is driven up."""
    simplified_strengths: tuple[float, ...] = (-1e-5, -3e-6, 1e-3)
    """Strengths λ of κ̂, negative where κ̂ is driven up."""
    ncc_strengths: tuple[float, ...] = (-1e-5, -1e-6, 1e-4)
    """Strengths λ of NCC, negative where NCC is driven up."""
    kappa_levels: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0)
    """Levels κ* to hold κ at."""
    simplified_levels: tuple[float, ...] = (0.3, 30.0, 3000.0)
    """Levels κ̂* to hold κ̂ at."""
    ncc_levels: tuple[float, ...] = (10.0, 50.0, 200.0, 1000.0)
    """Levels NCC* to hold NCC at."""
    hold_strength: float = 0.01
    """Strength μ of the term that holds a quantity."""
    hold_since: int = 200
    """Step from which quantities are held."""
    unplug_at: int = 500
    """Step from which nothing is pushed any more."""
    max_steps: int = 2000
    """Last step of an arm at the latest."""
    train_on: float = 0.25
    """Once all seeds have generalized, train on for this many times the steps that the last one took."""
    measure_every: int = 25
    """Steps between two measurements."""
    checkpoint_every: int = 500
    """Steps between two checkpoints, a multiple of `measure_every`."""
    folder: Path = Path("runs/interventions")
    seeds: int = 8

    may_differ = frozenset({"data_dir", "groups", "quantities"})

    def __post_init__(self):
        for name in ("checkpoint_every", "hold_since", "unplug_at", "max_steps"):
            if getattr(self, name) % self.measure_every:
                raise SystemExit(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, wanted a multiple of --measure-every, "
                    f"{self.measure_every}: between two measurements nothing changes"
                )
        if self.batch_size and self.task == "modular":
            raise SystemExit("--batch-size is for images: the modular task trains on all its equations")

    @property
    def default_name(self) -> str:
        return self.task


def _more(name: str, value: Any) -> Any:
    """Add a third and three times each strength, and a level between any two."""
    if name.endswith("strengths"):
        return tuple(sorted({float(f"{each * factor:.1g}") for each in value for factor in (1 / 3, 1, 3)}))
    if name.endswith("levels"):
        between = [math.sqrt(low * high) for low, high in itertools.pairwise(value)]
        return tuple(sorted({float(f"{each:.2g}") for each in (*value, *between)}))
    return value


def fully(config: Config) -> Config:
    """Return the variant with more strengths and levels, the controls of every strength, and 10 seeds."""
    several = {name: _more(name, value) for name, value in dataclasses.asdict(config).items()}
    return dataclasses.replace(config, **several | {"full": True, "seeds": 10})


_IMAGES = Config(
    task="digits", seeds=10, width=64, depth=2, learning_rate=1e-3, weight_decay=0.1, max_steps=1500, unplug_at=750,
    kappa_strengths=(-1e-3, -3e-5, 1e-2), simplified_strengths=(-1e-4, -3e-6, 1e-3),
    ncc_strengths=(-1e-3, -1e-4, 1e-3), kappa_levels=(0.01, 0.1, 1.0, 10.0), simplified_levels=(0.1, 3.0, 100.0),
    ncc_levels=(3.0, 10.0, 30.0, 100.0), hold_strength=0.1,
)  # fmt: skip

_TASKS = {
    "modular": ("x + y mod 23 by a transformer", Config()),
    "digits": ("scikit-learn's handwritten digits by a perceptron", _IMAGES),
    "mnist": ("MNIST by a perceptron", dataclasses.replace(_IMAGES, task="mnist")),
    "fashion-mnist": ("Fashion-MNIST by a perceptron", dataclasses.replace(_IMAGES, task="fashion-mnist")),
    "cifar10": ("CIFAR-10 by a perceptron", dataclasses.replace(_IMAGES, task="cifar10")),
}
TASKS = _TASKS | {
    f"{name}-full": (f"{description}, with more strengths, levels and controls", fully(config))
    for name, (description, config) in _TASKS.items()
}
"""These tasks can be run; each has its own defaults."""


def main(config: Config) -> None:
    """Train every arm, draw the figures, and report the results."""
    run = config.open_run()
    started = time.monotonic()
    experiment = Experiment(config, run)
    experiment.train()
    report(config, run, experiment.arms, experiment.learner.num_classes)
    print(f"{time.monotonic() - started:.0f} s. The table and the figures are in {run.path}")


def arms_of(config: Config) -> list[Arm]:
    """List the arms; the baseline is first, as others are compared with it."""
    strengths: dict[Quantity, tuple[float, ...]] = {
        "kappa": config.kappa_strengths,
        "simplified_kappa": config.simplified_strengths,
        "ncc": config.ncc_strengths,
    }
    levels: dict[Quantity, tuple[float, ...]] = {
        "kappa": config.kappa_levels,
        "simplified_kappa": config.simplified_levels,
        "ncc": config.ncc_levels,
    }
    arms = [BASELINE]
    for quantity in config.quantities:
        if "held" in config.groups:
            arms += held(quantity, levels[quantity], config.hold_strength, config.hold_since)
    by_quantity = {q: [pushed(q, each) for each in strengths[q]] for q in config.quantities}
    for arms_of_quantity in by_quantity.values():
        arms += arms_of_quantity if "pushed" in config.groups else []
    for quantity, arms_of_quantity in by_quantity.items():
        against = [arm for arm in arms_of_quantity if arm.strength < 0]
        mildest = sorted(against, key=lambda arm: -arm.strength)[:1]  # as it is the likeliest to answer
        if "controls" in config.groups and (config.full or quantity != "simplified_kappa"):
            arms += [control for arm in (arms_of_quantity if config.full else mildest) for control in controls(arm)]
    if "unplugged" in config.groups:
        arms += [pushed(q, min(strengths[q]), until=config.unplug_at) for q in config.quantities]
    return arms


class Experiment:
    """An experiment trains all arms of a run. Each rule has a program, which is compiled when it is first needed."""

    def __init__(self, config: Config, run: RunFolder):
        self.config, self.run, self.arms = config, run, arms_of(config)
        self.learner = learner_of(config)
        self._programs: dict[Rule, SeedTrainer] = {}

    def program(self, rule: Rule) -> SeedTrainer:
        if rule not in self._programs:
            self._programs[rule] = SeedTrainer(self.learner, setting_of(self.config), rule, self.config.all_seeds)
        return self._programs[rule]

    def train(self) -> None:
        left = sum(self._left(arm) for arm in self.arms)
        with Progress(self.config.task, {"measurement": left}) as progress:
            for arm in self.arms:
                self._train(arm, progress)

    def _left(self, arm: Arm) -> int:
        """Return the largest number of measurements to come."""
        records = self._records(arm)
        if is_done(self.config, arm, records):
            return 0
        return (
            self.config.max_steps - max((record["step"] for record in records), default=0)
        ) // self.config.measure_every

    def _records(self, arm: Arm) -> list[Record]:
        return [record for record in self.run.records if record["arm"] == arm.name]

    def _train(self, arm: Arm, progress: Progress) -> None:
        """Train an arm from its last checkpoint to its end."""
        config, run = self.config, self.run
        records, counted = self._records(arm), self._left(arm)
        if is_done(config, arm, records):
            return
        state = self.program(BASELINE.rule).start()
        with checkpointer(run.path / "checkpoints" / arm.folder) as checkpoints:
            step, state = load_latest(checkpoints, state)
            run.keep(lambda record: record["arm"] != arm.name or record["step"] <= step)
            records = self._records(arm)
            done = is_done(config, arm, records)
            while not done:
                if step >= 0:
                    program = self.program(arm.rule_at(step))
                    state = program.advance(state, step, arm.strength, arm.level)
                step = 0 if step < 0 else step + config.measure_every
                records += self._measure(arm, state, step)
                done = is_done(config, arm, records)
                if step:
                    counted -= 1
                    progress.done("measurement", note=one_line(arm, records[-config.seeds :]))
                if step % config.checkpoint_every == 0 or done:
                    checkpoints.save(step, state)
        progress.were_done({"measurement": counted})

    def _measure(self, arm: Arm, state: State, step: int) -> list[Record]:
        measured = self.program(BASELINE.rule).measure(state)
        for seed, values in zip(self.config.all_seeds, measured, strict=True):
            self.run.append({"arm": arm.name, "seed": seed, "step": step} | values)
        return self.run.records[-self.config.seeds :]


def learner_of(config: Config) -> Learner:
    if config.task == "modular":
        return modular_addition(config.modulus, config.train_share, config.width, config.depth)
    return image_classification(
        config.task, config.data_dir, config.num_train, config.num_held_out, config.width, config.depth
    )


def setting_of(config: Config) -> Setting:
    schedule = optax.linear_schedule(0, config.learning_rate, _WARMUP)
    optimizer = optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay)
    return Setting(optimizer, config.measure_every, config.batch_size, bounds_of(config))


def bounds_of(config: Config) -> Bounds:
    return Bounds(config.feature_norm, config.head_norm, config.softness, config.sphere)


_WARMUP = 10


def is_done(config: Config, arm: Arm, records: list[Record]) -> bool:
    """Say whether an arm has ended.

    It ends at the last step, or once every seed has generalized, `train_on` times as far again, or diverged.

    An arm goes on for as long again after it was unplugged, at least.
    """
    step = records[-1]["step"] if records else -1
    if sum(record["step"] == step for record in records[-config.seeds :]) < config.seeds:
        return False  # killed between two seeds
    if step >= config.max_steps:
        return True
    ends = [0 if arm.until is None else int((1 + config.train_on) * arm.until)]
    for seed in config.all_seeds:
        of_seed = [record for record in records if record["seed"] == seed]
        if diverged_at(of_seed) is None:
            generalized = generalized_at(of_seed)
            if generalized is None:
                return False
            ends.append(int((1 + config.train_on) * generalized))
    return step >= max(ends)


def one_line(arm: Arm, records: list[Record]) -> str:
    held_out = [record["held_out_accuracy"] for record in records]
    worst = "diverged" if None in held_out else f"{min(held_out):.0%} held out at worst"
    return f"{arm.name}, {worst}"


def report(config: Config, run: RunFolder, arms: list[Arm], num_classes: int) -> None:
    """Write the table, the figures and the summary."""
    of_arms = {
        arm.name: [[record for record in run.records if (record["arm"], record["seed"]) == (arm.name, seed)]
                   for seed in config.all_seeds]
        for arm in arms
    }  # fmt: skip
    results = arm_results(
        arms,
        of_arms,
        num_classes=num_classes,
        bounds=bounds_of(config),
        resolution=config.measure_every,
    )
    found = dose_responses(results, of_arms[BASELINE.name], config.measure_every)
    text = "\n\n".join(part for part in (table(results), dose_response_table(found)) if part)
    print(text)
    (run.path / "table.txt").write_text(text + "\n")
    run.summarise(to_summary(results) | {"dose_response": found})
    title = f"{config.task}, {config.seeds} seeds"
    draw_training(run.path, arms, of_arms, title)
    draw_dose_response(run.path / "dose_response.png", results, title)
    draw_delays(run.path / "delay.png", results, title)


if __name__ == "__main__":
    # A device a core: small networks on two cores are trained in half the time two at a time.
    jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))
    main(variant_of(TASKS, sys.argv[1:]))
