"""Compare where a language model should be flat: λκ at the head, one block or all of them, beside SAM and nothing.

    python experiments/llm_placement.py                                         # 25 to 40 minutes on 2 cores
    python experiments/llm_placement.py --width 256 --depth 6 --steps 5000 --seeds 3 --name larger

All arms have the same number of steps; what a step costs is told. Each is tuned on the same number of strengths by the
loss on held-out files, with a seed that is not used again, and trained anew with others in the best. A seed decides
what of the text is held out, files and whole modules, the tokens, the initial weights, the batches and the probes; arms
share all of that, and are compared with the plain one seed by seed.

Measured after training: the loss on held-out files and on held-out modules (transfer), and by how much the loss on
held-out files rises when all kernels, the embedding's too, get Gaussian noise of a share of their norm, or are rounded
to int8 or int4 with one scale an output.

Writes to `runs/llm_placement/<name>/`: `config.json`, `metrics.jsonl` (a line a network), `table.txt`, `figure.png` and
`summary.json`. Killed at any moment, the same command with --resume goes on, and ends with the same metrics; networks
in training at that moment are trained anew.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro

from flatjax.models import DecoderConfig
from flatjax.run.options import SeedOptions, check_heads, check_least
from flatjax.run.progress import Progress
from flatjax.run.records import Record, RunFolder, number
from flatjax.run.text import Document, evenly, read, standard_library
from flatjax.training import sharpness_aware
from harness.benchmarks.timing import side_by_side
from harness.data import text
from harness.data.batches import shuffled_epochs
from harness.llm_placement.tables import draw, quantities, row_of, table
from harness.llm_placement.trials import Trial, measure, train
from harness.training.decoders import HEAD, Descent, Penalty, State, network, penalty
from harness.training.parallel import Parallel

Arm = Literal["plain", "head", "block", "blocks", "sam"]


@dataclasses.dataclass(frozen=True)
class Config(SeedOptions):
    """Compare where relative flatness is best regularised in a small language model."""

    text: tuple[Path, ...] = ()
    """Files or folders of text; by default Python's standard library."""
    pattern: str = "*"
    """Pattern for the names of the folders' files to read."""
    arms: tuple[Arm, ...] = ("plain", "head", "block", "blocks", "sam")
    """Arms to compare; plain is one of them."""
    head_strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    """Strengths λ of κ of the head."""
    block_strengths: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    """Strengths λ of the sum of κ over the kernels of the middle block."""
    blocks_strengths: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3)
    """Strengths λ of the sum of κ over the kernels of all blocks."""
    sam_strengths: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1)
    """Radii ρ of SAM."""
    probe_share: float = 0.25
    """Share of a batch's sequences on which κ of kernels is estimated, by one direction per step."""
    vocab_size: int = 1024
    """Number of tokens in the vocabulary, of byte pairs."""
    width: int = 64
    """Width of the residual stream."""
    depth: int = 3
    """Number of decoder blocks."""
    heads: int = 4
    """Number of attention heads per block."""
    context: int = 64
    """Number of tokens per sequence."""
    batch_size: int = 8
    """Number of sequences per step."""
    steps: int = 600
    """Number of training steps."""
    learning_rate: float = 5e-3
    """Learning rate of AdamW, between warm-up and decay."""
    warm_up: int = 50
    """Number of steps in which the learning rate rises from 0."""
    decay_share: float = 0.2
    """Share of the steps in which the learning rate falls to 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW, on all matrices."""
    clip: float = 1.0
    """Largest norm of a gradient; longer ones are clipped."""
    noises: tuple[float, ...] = (0.1, 0.3)
    """Noise that each kernel gets after training, as a share of its norm."""
    draws: int = 4
    """Number of draws of the noise."""
    measure_on: int = 256
    """Largest number of sequences measured of each part of the held-out text."""
    timing_seconds: float = 20.0
    """Least time, in seconds, for which a step is timed."""
    folder: Path = Path("runs/llm_placement")
    seeds: int = 6

    may_differ = frozenset({"arms"})

    def __post_init__(self):
        if "plain" not in self.arms:
            raise SystemExit(f"--arms is {' '.join(self.arms)}, wanted plain among them, to compare with")
        check_least(self, 1, "steps", "batch_size", "seeds", "draws", "depth", "width", "vocab_size", "context")
        check_heads(self.width, self.heads)

    @property
    def default_name(self) -> str:
        return "standard-library"

    @property
    def model(self) -> DecoderConfig:
        return DecoderConfig(self.vocab_size, self.width, self.depth, self.heads)

    @property
    def descent(self) -> Descent:
        return Descent(self.steps, self.learning_rate, self.warm_up, self.decay_share, self.weight_decay, self.clip)

    def strengths(self, arm: Arm) -> tuple[float, ...]:
        return () if arm == "plain" else getattr(self, f"{arm}_strengths")

    @property
    def block(self) -> str:
        """Return the index of the middle block."""
        return f"blocks/{self.depth // 2}"

    def layers(self, arm: Arm) -> tuple[str, ...]:
        return {"head": (HEAD,), "block": (self.block,), "blocks": ("blocks",)}.get(arm, ())

    def optimizer_of(self, arm: Arm) -> Callable[[Any], optax.GradientTransformation]:
        """Return the optimizer of an arm at a strength."""
        descent = self.descent.optimizer()
        return (lambda radius: sharpness_aware(descent, radius)) if arm == "sam" else lambda _: descent

    def title(self, arm: Arm) -> str:
        return {
            "plain": "plain", "head": "κ of the head", "block": f"κ of {self.block}", "blocks": "κ of all blocks",
            "sam": "SAM",
        }[arm]  # fmt: skip


def main(config: Config) -> None:
    """Tune and train whatever is not in the records yet, and report."""
    run = config.open_run()
    started = time.monotonic()
    compare(config, run)
    report(config, run)
    print(f"{time.monotonic() - started:.0f} s. The table and the figure are in {run.path}")


class Programs:
    """Programs train and measure as many networks at a time as there are devices; each arm is compiled once."""

    def __init__(self, config: Config, run: RunFolder):
        self.config, self.run = config, run
        self.network, params = network(config.model, 0)
        self.penalties: dict[Arm, Penalty] = {
            arm: penalty(params, config.layers(arm), config.probe_share) for arm in config.arms
        }
        self.probed = penalty(params, ("blocks",), share=1.0)
        self.parallel = Parallel()
        self._train: dict[Arm, Callable[..., State]] = {}
        measuring = functools.partial(measure, self.network, self.probed, config.noises, config.draws)
        self._measure = self.parallel.map(measuring, num_split=2)
        self._windows: dict[int, dict[text.Part, np.ndarray]] = {}

    @functools.cached_property
    def documents(self) -> list[Document]:
        return read(self.config.text, self.config.pattern) if self.config.text else standard_library()

    def windows(self, seed: int) -> dict[text.Part, np.ndarray]:
        """Return the windows of all parts of the text, as a seed cuts it."""
        if seed not in self._windows:
            self._windows[seed] = self._cut(seed)
        return self._windows[seed]

    def _cut(self, seed: int) -> dict[text.Part, np.ndarray]:
        parts = text.split(self.documents, text.Shares(seed=seed))
        file = self.run.path / "tokenizers" / f"{seed}.json"
        file.parent.mkdir(exist_ok=True)
        tokenizer = text.cached_tokenizer(file, parts["train"], self.config.vocab_size)
        found = text.corpus(parts, tokenizer, self.config.context)
        return {part: np.array(windows) for part, windows in found.items()}

    def trial(self, strength: float, seed: int) -> Trial:
        config, windows = self.config, self.windows(seed)
        chosen = shuffled_epochs(len(windows["train"]), config.steps * config.batch_size, seed)
        batches = windows["train"][chosen].reshape(config.steps, config.batch_size, -1)
        if (fewest := min(len(windows["held_out"]), len(windows["transfer"]))) < config.measure_on:
            raise SystemExit(
                f"--measure-on is {config.measure_on}, but with seed {seed} a part of the text has {fewest} sequences"
            )
        parts = [evenly(each, config.measure_on) for each in (windows["held_out"], windows["transfer"])]
        _, params = network(config.model, seed)
        return Trial(np.float32(strength), np.uint32(seed), jax.tree.map(np.asarray, params), batches, *parts)

    def train(self, arm: Arm, several: Trial, end: int | None = None) -> State:
        """Return the parameters after the step `end`."""
        if arm not in self._train:
            function = functools.partial(train, self.network, self.penalties[arm], self.config.optimizer_of(arm))
            self._train[arm] = self.parallel.map(function, num_split=1)
        return self._train[arm](several, self.config.steps if end is None else end)

    def measured(self, arm: Arm, trials: list[Trial]) -> list[Record]:
        """Train at most as many networks as there are devices, and return what is measured of each."""
        several = self.parallel.stack(trials)
        values = jax.device_get(self._measure(several, self.train(arm, several)))
        return [{name: value[i].item() for name, value in values.items()} for i in range(len(trials))]


def compare(config: Config, run: RunFolder) -> None:
    """Tune each arm, train it at its best, and time a step of each."""
    programs = Programs(config, run)
    left = sum(max(len(config.strengths(arm)), 1) + config.seeds for arm in config.arms)
    left -= len([record for record in run.records if record["phase"] in _PHASES and record["arm"] in config.arms])
    with Progress(config.run_name, {"network": left}) as progress:
        for arm in config.arms:
            for phase in _PHASES:
                todo = trials_of(config, run, phase, arm)
                for start in range(0, len(todo), programs.parallel.size):
                    some = todo[start : start + programs.parallel.size]
                    results = programs.measured(arm, [programs.trial(*each) for each in some])
                    for (strength, seed), result in zip(some, results, strict=True):
                        run.append({"phase": phase, "arm": arm, "strength": strength, "seed": seed} | result)
                    progress.done("network", len(some), f"{config.title(arm)}, {phase}")
    if {record["arm"] for record in run.records if record["phase"] == "timing"} < set(config.arms):
        run.keep(lambda record: record["phase"] != "timing")
        for record in timed(config, programs):
            run.append({"phase": "timing"} | record)


_PHASES = ("tuning", "final")


def trials_of(config: Config, run: RunFolder, phase: str, arm: Arm) -> list[tuple[float, int]]:
    """List the strengths and seeds that have no record yet."""
    if phase == "tuning":
        wanted = [(strength, config.seed + _TUNING) for strength in config.strengths(arm) or (0.0,)]
    else:
        wanted = [(best_of(run, arm)["strength"], config.seed + i) for i in range(config.seeds)]
    done = {(record["strength"], record["seed"]) for record in records_of(run, phase, arm)}
    return [each for each in wanted if each not in done]


_TUNING = 1000


def records_of(run: RunFolder, phase: str, arm: Arm) -> list[Record]:
    """Return the records in the order of the strengths and seeds."""
    found = [record for record in run.records if (record["phase"], record["arm"]) == (phase, arm)]
    return sorted(found, key=lambda record: (record["strength"], record["seed"]))


def best_of(run: RunFolder, arm: Arm) -> Record:
    """Return the best strength by the loss on held-out files; a network that diverged comes last."""

    def loss(record: Record) -> float:
        value = number(record["held_out"])
        return value if np.isfinite(value) else np.inf

    return min(records_of(run, "tuning", arm), key=loss)


def timed(config: Config, programs: Programs) -> list[Record]:
    """Time a step of one network on one device, in seconds, with all devices at work and all arms in turn."""
    steps = min(_STEPS_TIMED, config.steps)
    trials = [programs.trial(0.01, config.seed)] * programs.parallel.size
    several = programs.parallel.stack(trials)
    calls: dict[str, Callable[[], Any]] = {
        arm: functools.partial(programs.train, arm, several, steps) for arm in config.arms
    }
    return [
        {"arm": arm, "seconds": each.seconds / steps, "ratio": each.ratio, "quartiles": list(each.ratio_quartiles)}
        for arm, each in side_by_side(calls, reference="plain", min_seconds=config.timing_seconds).items()
    ]


_STEPS_TIMED = 10


def report(config: Config, run: RunFolder) -> None:
    """Write the tables, the figure and the summary."""
    rows = {}
    for arm in config.arms:
        (timing,) = [record for record in run.records if record["phase"] == "timing" and record["arm"] == arm]
        rows[config.title(arm)] = row_of(
            quantities(config.noises),
            records_of(run, "final", arm),
            None if arm == "plain" else records_of(run, "final", "plain"),
            records_of(run, "tuning", arm),
            timing,
        )
    lines = table(quantities(config.noises), rows, config.seeds, config.steps)
    print(lines)
    (run.path / "table.txt").write_text(lines + "\n")
    run.summarise(dict(zip(config.arms, rows.values(), strict=True)))
    draw(run.path / "figure.png", quantities(config.noises), rows, config.seeds)


if __name__ == "__main__":
    # A device a core: small networks on two cores are trained in half the time two at a time.
    jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))
    main(tyro.cli(Config))
