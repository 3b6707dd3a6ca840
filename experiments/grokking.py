"""A transformer groks modular arithmetic, with relative flatness and neural collapse measured along the way.

    python experiments/grokking.py                                    # x + y mod 97: about 90 s on 2 cores
    python experiments/grokking.py --seeds 3                          # three seeds, with bands
    python experiments/grokking.py --depth 2 --train-share 0.2 --learning-rate 1e-4 --max-steps 100000    # as published

All equations `<x> <op> <y> = <x ∘ y>` mod p are split into those trained on and those held out. The network fits the
first within a few hundred steps, and gets the others right after about two thousand. It stops some time after that.

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
    """What is to be learned: x + y, x − y, x · y, x / y, or x² + xy + y², mod p."""
    modulus: int = 97
    """p."""
    train_share: float = 0.4
    """Share of the equations that is trained on."""
    depth: int = 1
    """Blocks of the transformer."""
    width: int = 128
    """Features of the transformer."""
    heads: int = 4
    """Attention heads."""
    normalise: bool = False
    """Pre-layer normalisation, in the blocks and before the head."""
    learning_rate: float = 1e-3
    """Of AdamW, reached in `warmup` steps."""
    warmup: int = 10
    """Steps."""
    weight_decay: float = 1.0
    """Of AdamW, decoupled, on all parameters."""
    beta2: float = 0.98
    """Of AdamW."""
    batch_size: int = 512
    """At most half of what is trained on."""
    max_steps: int = 20_000
    """Stop here at the latest."""
    train_on: float = 1.0
    """Once 99 % of the held-out equations are right, go on for this many times the steps that took."""
    measure_every: int = 25
    """Steps from one measurement to the next."""
    checkpoint_every: int = 250
    """Steps from one checkpoint to the next, a multiple of `measure_every`."""
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
    """Runs every seed, draws the figure, and says what came first."""
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
    """Trains one seed from where it was left to its end, with a record every `measure_every` steps."""
    splits = modular.split(modular.equations(config.operation, config.modulus), config.train_share, seed)
    train_set, held_out = (tuple(map(jnp.asarray, part)) for part in splits)
    graph, state = initial_state(config, seed)
    train_some, measure = training(config, graph, seed, num_train=len(train_set[1]))

    with checkpointer(run.path / "checkpoints" / f"seed-{seed}") as checkpoints:
        step, state = load_latest(checkpoints, state)
        run.keep(lambda record: record["seed"] != seed or record["step"] <= step)
        records = [record for record in run.records if record["seed"] == seed]
        with tqdm(total=config.max_steps, initial=max(step, 0), desc=f"seed {seed}", unit="step") as progress:
            end = last_step(config, records)
            while step < end:
                if step >= 0:
                    state = train_some(state, step, *train_set)
                    progress.update(config.measure_every)
                step = 0 if step < 0 else step + config.measure_every
                measured = {"train": measure(state, *train_set), "held_out": measure(state, *held_out)}
                record = {"seed": seed, "step": step} | {
                    f"{part}_{name}": value.item() for part in measured for name, value in measured[part].items()
                }
                run.append(record)
                records.append(record)
                progress.total = end = last_step(config, records)
                progress.set_postfix_str(one_line(record))
                if step % config.checkpoint_every == 0 or step >= end:
                    checkpoints.save(step, state)


def initial_state(config: Config, seed: int) -> tuple[nnx.GraphDef, State]:
    """The model's structure; its parameters, with the optimizer's state."""
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


def training(config: Config, graph: nnx.GraphDef, seed: int, num_train: int):
    """The two jitted functions of a run: `measure_every` steps of training, and a measurement."""
    batch_size = min(config.batch_size, num_train // 2)
    batch_key = jax.random.fold_in(jax.random.key(seed), 0)

    def loss(params: State, tokens: jax.Array, labels: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        logits = model.head(model.last_features(tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def one_step(state: State, step: jax.Array, tokens: jax.Array, labels: jax.Array) -> State:
        chosen = batch_at(batch_key, step, num_train, batch_size)
        grads = jax.grad(loss)(state["params"], tokens[chosen], labels[chosen])
        updates, optimizer_state = optimizer(config).update(grads, state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "optimizer": optimizer_state}

    @functools.partial(jax.jit, donate_argnums=0)
    def train_some(state: State, first_step: int, tokens: jax.Array, labels: jax.Array) -> State:
        steps = first_step + jnp.arange(config.measure_every)
        return jax.lax.scan(lambda state, step: (one_step(state, step, tokens, labels), None), state, steps)[0]

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
    """Where training stops: `train_on` times as far again as to 99 % of the held-out equations, or at `max_steps`."""
    generalized = steps_to(records, "held_out_accuracy")
    return config.max_steps if generalized is None else min(config.max_steps, int((1 + config.train_on) * generalized))


def one_line(record: Record) -> str:
    return (
        f"κ {record['train_relative_flatness']:.3g}, NCC {record['train_ncc']:.3g}, "
        f"accuracy {record['train_accuracy']:.1%} train, {record['held_out_accuracy']:.1%} held out"
    )


def steps_to(records: list[Record], accuracy: str) -> int | None:
    return first_step_at_least([record["step"] for record in records], [record[accuracy] for record in records], 0.99)


def summarise(records: list[Record]) -> Record:
    """The steps at which accuracy passes 99 %, and, if it did so held out, at which κ and NCC are half-way down."""
    steps = [record["step"] for record in records]
    generalized = steps_to(records, "held_out_accuracy")
    return {
        "train_accuracy_99": steps_to(records, "train_accuracy"),
        "held_out_accuracy_99": generalized,
        **{
            f"{name}_halfway": generalized and halfway_down(steps, [record[name] for record in records], generalized)
            for name in ("train_relative_flatness", "train_ncc", "held_out_relative_flatness", "held_out_ncc")
        },
        "last_step": steps[-1],
    }


def draw(path: Path, config: Config, runs: list[list[Record]], summaries: list[Record]) -> None:
    panels = [
        Panel("accuracy", "accuracy", log=False),
        Panel("relative_flatness", "relative flatness κ"),
        Panel("ncc", "collapse NCC"),
    ]
    milestones = {
        "fits": [summary["train_accuracy_99"] for summary in summaries],
        "generalizes": [summary["held_out_accuracy_99"] for summary in summaries],
    }
    title = (
        f"{config.operation} mod {config.modulus}, {config.train_share:.0%} trained on, depth {config.depth}, "
        f"{len(runs)} {'seeds' if len(runs) > 1 else 'seed'}"
    )
    draw_training(path, runs, panels, title, milestones)


def report(config: Config, summary: dict[str, Record]) -> str:
    """A table with a row a seed, and what it says."""
    rows = {
        "train accuracy passes 99 %": "train_accuracy_99",
        "held-out accuracy passes 99 %": "held_out_accuracy_99",
        "κ (train) half-way down": "train_relative_flatness_halfway",
        "NCC (train) half-way down": "train_ncc_halfway",
        "κ (held out) half-way down": "held_out_relative_flatness_halfway",
        "NCC (held out) half-way down": "held_out_ncc_halfway",
        "stopped": "last_step",
    }
    width = max(map(len, rows))
    lines = [f"{'step at which':{width}}" + "".join(f"{'seed ' + seed:>10}" for seed in summary)]
    for label, key in rows.items():
        lines.append(f"{label:{width}}" + "".join(f"{_or_never(run[key]):>10}" for run in summary.values()))
    never = [seed for seed, run in summary.items() if run["held_out_accuracy_99"] is None]
    if never:
        lines.append(f"Seed {', '.join(never)} did not generalize within {config.max_steps} steps.")
    else:
        lines.append(f"Stopped {config.train_on:g} times as far again as to generalization.")
    return "\n".join(
        [*lines, "Half-way is on a log axis: from the highest value until generalization to the lowest after it."]
    )


def _or_never(step: int | None) -> str:
    return "never" if step is None else str(step)


if __name__ == "__main__":
    main(tyro.cli(Config))
