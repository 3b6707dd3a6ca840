"""Train a transformer until it groks modular arithmetic, and measure relative flatness and neural collapse on the way.

    python experiments/grokking.py                                    # x + y mod 97: about 90 s on 2 cores
    python experiments/grokking.py --seeds 3                          # three seeds, with bands
    python experiments/grokking.py --depth 2 --train-share 0.2 --learning-rate 1e-4 --max-steps 100000    # as published

All equations `<x> <op> <y> = <x ∘ y>` mod p are split into those trained on and those held out. The network fits the
first within a few hundred steps, and gets the others right after about two thousand. It stops some time after that.
The summary says how far down relative flatness κ (larger is sharper) and NCC (0 is collapsed) were by then. NCC is the
class-distance variance CDNV summed over all ordered pairs of classes; it is not the accuracy of nearest class centres.

Writes to `runs/grokking/<name>/`: `config.json`, `metrics.jsonl` (a line a measurement), `checkpoints/` (Orbax),
`figure.png` and `summary.json`. Killed at any moment, the same command with --resume goes on, and ends with the same
metrics to the last bit. (On a GPU that takes XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

from flatjax import cross_entropy, neural_collapse, relative_flatness, simplified_relative_flatness
from flatjax.models import Transformer
from flatjax.run.checkpoints import checkpointer, load_latest
from flatjax.run.options import SeedOptions
from flatjax.run.records import Record, RunFolder
from harness.data import modular
from harness.data.batches import batch_at
from harness.results.figures import Panel, draw_training
from harness.results.milestones import first_step_at_least, halfway_down

State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config(SeedOptions):
    """Grok modular arithmetic, measuring relative flatness and neural collapse along the way."""

    operation: modular.Operation = "add"
    """The operation to learn: x + y, x − y, x · y, x / y, or x² + xy + y², mod p."""
    modulus: int = 97
    """The modulus p, a prime number."""
    train_share: float = 0.4
    """Share of the equations that the network trains on."""
    depth: int = 1
    """Number of transformer blocks."""
    width: int = 128
    """Width of the residual stream."""
    heads: int = 4
    """Number of attention heads per block."""
    normalise: bool = False
    """Normalise layers before each block part and before the head."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW, reached after `warmup` steps."""
    warmup: int = 10
    """Number of steps in which the learning rate rises from 0."""
    weight_decay: float = 1.0
    """Decoupled weight decay of AdamW, on all parameters."""
    beta2: float = 0.98
    """Decay β₂ of AdamW's second moment."""
    batch_size: int = 512
    """Equations per step, at most half of the training set."""
    max_steps: int = 20_000
    """Stop at this step at the latest."""
    train_on: float = 1.0
    """Once 99 % of the held-out equations are right, train on for this many times the steps taken so far."""
    measure_every: int = 25
    """Steps between two measurements."""
    checkpoint_every: int = 250
    """Steps between two checkpoints, a multiple of `measure_every`."""
    folder: Path = Path("runs/grokking")

    may_differ = frozenset({"seed", "seeds"})

    def __post_init__(self):
        if self.checkpoint_every % self.measure_every:
            raise SystemExit(
                f"--checkpoint-every is {self.checkpoint_every}, wanted a multiple of --measure-every, "
                f"{self.measure_every}: a run resumes at a measurement"
            )
        if self.width % self.heads:
            raise SystemExit(f"--width is {self.width}, wanted a multiple of --heads, {self.heads}")

    @property
    def default_name(self) -> str:
        return f"{self.operation}-{self.modulus}"


def main(config: Config) -> None:
    """Run every seed, draw the figure, and report what came first."""
    run = config.open_run()
    seeds = config.all_seeds
    started = time.monotonic()
    for seed in seeds:
        train(config, seed, run)
    curves = {seed: [record for record in run.records if record["seed"] == seed] for seed in seeds}
    summary = {str(seed): summarise(curves[seed]) for seed in seeds}
    run.summarise(summary)
    draw(run.path / "figure.png", config, list(curves.values()), list(summary.values()))
    print(report(config, summary))
    print(f"{time.monotonic() - started:.0f} s. The figure is {run.path / 'figure.png'}")


def train(config: Config, seed: int, run: RunFolder) -> None:
    """Train one seed from its last checkpoint to its end, with a record every `measure_every` steps."""
    splits = modular.split(modular.equations(config.operation, config.modulus), config.train_share, seed)
    train_set, held_out = (tuple(map(jnp.asarray, part)) for part in splits)
    graph, state = initial_state(config, seed)
    train_some, measure = training(config, graph, num_train=len(train_set[1]))
    batch_key = jax.random.fold_in(jax.random.key(seed), 0)

    with checkpointer(run.path / "checkpoints" / f"seed-{seed}") as checkpoints:
        step, state = load_latest(checkpoints, state)
        run.keep(lambda record: record["seed"] != seed or record["step"] <= step)
        records = [record for record in run.records if record["seed"] == seed]
        end = last_step(config, records)
        with tqdm(total=end, initial=max(step, 0), desc=f"seed {seed}", bar_format=_bar(config, records)) as progress:
            progress.set_postfix_str("compiling, up to a minute")
            is_compiled = False
            while step < end:
                if step >= 0:
                    state = train_some(state, batch_key, step, *train_set)
                    if not is_compiled:
                        jax.block_until_ready(state)
                        progress.unpause()  # the time left is told without the time that compiling took
                        is_compiled = True
                    progress.update(config.measure_every)
                step = 0 if step < 0 else step + config.measure_every
                measured = {"train": measure(state, *train_set), "held_out": measure(state, *held_out)}
                record = {"seed": seed, "step": step} | {
                    f"{part}_{name}": value.item() for part in measured for name, value in measured[part].items()
                }
                run.append(record)
                records.append(record)
                progress.total = end = last_step(config, records)
                progress.bar_format = _bar(config, records)
                progress.set_postfix_str(one_line(record) + (", compiling the training" if step == 0 else ""))
                if step % config.checkpoint_every == 0 or step >= end:
                    checkpoints.save(step, state)


def initial_state(config: Config, seed: int) -> tuple[nnx.GraphDef, State]:
    """Return the model's structure, and its parameters with the optimizer's state."""
    model = Transformer(
        vocab_size=modular.vocab_size(config.modulus),
        num_outputs=config.modulus,
        context=modular.CONTEXT,
        width=config.width,
        depth=config.depth,
        num_heads=config.heads,
        normalise=config.normalise,
        rngs=nnx.Rngs(seed),
    )
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    return graph, {"params": params, "optimizer": optimizer(config).init(params)}


def optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.linear_schedule(0, config.learning_rate, config.warmup)
    return optax.adamw(schedule, b1=0.9, b2=config.beta2, weight_decay=config.weight_decay)


@functools.cache
def training(config: Config, graph: nnx.GraphDef, num_train: int):
    """Return the two jitted functions of all seeds: `measure_every` steps of training, and a measurement."""
    batch_size = min(config.batch_size, num_train // 2)

    def loss(params: State, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        logits = model.head(model.last_features(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def one_step(state: State, batch_key: jax.Array, step: jax.Array, tokens: jax.Array, labels: jax.Array) -> State:
        chosen = batch_at(batch_key, step, num_train, batch_size)
        grads = jax.grad(loss)(state["params"], tokens[chosen], labels[chosen])
        updates, optimizer_state = optimizer(config).update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}

    @functools.partial(jax.jit, donate_argnums=0)
    def train_some(state: State, batch_key: jax.Array, first_step: int, tokens: jax.Array, labels: jax.Array) -> State:
        steps = first_step + jnp.arange(config.measure_every)
        state, _ = jax.lax.scan(lambda x, step: (one_step(x, batch_key, step, tokens, labels), None), state, steps)
        return state

    @jax.jit
    def measure(state: State, tokens: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        model = nnx.merge(graph, state["params"])
        feats = model.last_features(tokens)
        logits, head = model.head(feats), state["params"]["head"]
        collapse = neural_collapse(head, feats, labels, num_classes=config.modulus)
        return {
            "loss": cross_entropy(logits, labels).mean(),
            "accuracy": jnp.mean(jnp.argmax(logits, axis=1) == labels),
            "relative_flatness": relative_flatness(head, feats, labels),
            "simplified_relative_flatness": simplified_relative_flatness(head, feats, labels),
        } | collapse._asdict()

    return train_some, measure


def last_step(config: Config, records: list[Record]) -> int:
    """Return the step at which training stops, as far as the records decide it.

    Training stops `train_on` times as far again as 99 % of the held-out equations took, or at `max_steps`; either is
    rounded up to a measurement.
    """
    generalized = steps_to(records, "held_out_accuracy")
    end = config.max_steps if generalized is None else min(config.max_steps, int((1 + config.train_on) * generalized))
    return -(-end // config.measure_every) * config.measure_every


def _bar(config: Config, records: list[Record]) -> str:
    """Return the format of the progress bar: until the network generalizes, its end is only the latest possible."""
    at_most = "at most " if steps_to(records, "held_out_accuracy") is None else ""
    return f"{{desc}}: step {{n_fmt}} of {at_most}{{total_fmt}} |{{bar:20}}| {at_most}{{remaining}} left{{postfix}}"


def one_line(record: Record) -> str:
    return (
        f"κ {record['train_relative_flatness']:.3g}, NCC {record['train_ncc']:.3g}, "
        f"accuracy {record['train_accuracy']:.1%} train, {record['held_out_accuracy']:.1%} held out"
    )


def steps_to(records: list[Record], accuracy: str) -> int | None:
    return first_step_at_least([record["step"] for record in records], [record[accuracy] for record in records], 0.99)


_MEASURES = {
    "held_out_accuracy": "held-out accuracy",
    "train_relative_flatness": "κ (train), larger is sharper",
    "train_ncc": "NCC (train), 0 is collapsed",
    "held_out_relative_flatness": "κ (held out)",
    "held_out_ncc": "NCC (held out)",
}
"""The table of values after generalization has these rows, by their names in the records."""


def summarise(records: list[Record]) -> Record:
    """Return what one seed shows, as plain numbers.

    These are the steps at which the accuracies pass 99 %, the steps at which κ and NCC are half-way down, and every
    measure's last value. The last value may stand in a spike of the optimizer, so that the median from generalization
    on stands beside it. A network that does not generalize has neither half-way steps nor medians.
    """
    steps = [record["step"] for record in records]
    generalized = steps_to(records, "held_out_accuracy")
    after = [] if generalized is None else [record for record in records if record["step"] >= generalized]
    return {
        "train_accuracy_99": steps_to(records, "train_accuracy"),
        "held_out_accuracy_99": generalized,
        **{
            f"{name}_halfway": generalized and halfway_down(steps, [record[name] for record in records], generalized)
            for name in ("train_relative_flatness", "train_ncc", "held_out_relative_flatness", "held_out_ncc")
        },
        "last_step": steps[-1],
        "median_after_generalization": {
            name: float(np.median(np.array([record[name] for record in after], float))) if after else None
            for name in _MEASURES
        },
        "last": {name: records[-1][name] for name in _MEASURES},
    }


def draw(path: Path, config: Config, runs: list[list[Record]], summaries: list[Record]) -> None:
    panels = [
        Panel("accuracy", "accuracy", log=False),
        Panel("relative_flatness", "relative flatness κ\n(larger is sharper)"),
        Panel("ncc", "collapse NCC\n(0 is collapsed)"),
    ]
    milestones = {
        "fits": [summary["train_accuracy_99"] for summary in summaries],
        "generalizes": [summary["held_out_accuracy_99"] for summary in summaries],
    }
    title = (
        f"{config.operation} mod {config.modulus}, {config.train_share:.0%} of the equations trained on, "
        f"depth {config.depth}, {len(runs)} {'seeds' if len(runs) > 1 else 'seed'}"
    )
    draw_training(path, runs, panels, title, milestones)


def report(config: Config, summary: dict[str, Record]) -> str:
    """Return the tables of steps and of values, with a column per seed, and one sentence of conclusion."""
    rows = {
        "train accuracy passes 99 %": "train_accuracy_99",
        "held-out accuracy passes 99 %": "held_out_accuracy_99",
        "κ (train) is half-way down": "train_relative_flatness_halfway",
        "NCC (train) is half-way down": "train_ncc_halfway",
        "κ (held out) is half-way down": "held_out_relative_flatness_halfway",
        "NCC (held out) is half-way down": "held_out_ncc_halfway",
        "training stopped": "last_step",
    }
    width = max(map(len, (*rows, *_MEASURES.values())))
    lines = [f"{'step at which':{width}}" + "".join(f"{'seed ' + seed:>20}" for seed in summary)]
    for label, key in rows.items():
        lines.append(f"{label:{width}}" + "".join(f"{_or_never(run[key]):>20}" for run in summary.values()))
    lines += ["", f"{'median after generalization, last value':{width}}"]
    for key, label in _MEASURES.items():
        both = (
            f"{_digits(run['median_after_generalization'][key])}, {_digits(run['last'][key])}"
            for run in summary.values()
        )
        lines.append(f"{label:{width}}" + "".join(f"{values:>20}" for values in both))
    return "\n".join(
        [
            *lines,
            "",
            "Half-way is on a log axis: from the highest value until generalization to the lowest value after it.",
            conclusion(config, list(summary.values())),
        ]
    )


def conclusion(config: Config, runs: list[Record]) -> str:
    """Say in one sentence how far collapse and flatness were on the way to generalization: the median over seeds."""
    generalized = [run for run in runs if run["held_out_accuracy_99"]]
    if not generalized:
        return f"No network generalized within {config.max_steps} steps, so that nothing is known of what comes first."
    collapse, flatness = (_share_of_the_way(generalized, key) for key in ("train_ncc", "train_relative_flatness"))
    those = f"{len(runs)} seeds" if generalized == runs else f"the {len(generalized)} of {len(runs)} that generalized"
    subject = "Collapse" if len(runs) == 1 else f"In the median over {those}, collapse"
    return f"{subject} (NCC) was half-way down at {collapse} of the way to generalization, κ at {flatness}."


def _share_of_the_way(runs: list[Record], measure: str) -> str:
    steps = [(run[f"{measure}_halfway"], run["held_out_accuracy_99"]) for run in runs]
    shares = [100 * halfway / generalized for halfway, generalized in steps if halfway is not None]
    return f"{np.median(shares):.0f} %" if shares else "no part"


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _or_never(step: int | None) -> str:
    return "never" if step is None else str(step)


if __name__ == "__main__":
    main(tyro.cli(Config))
