"""Rank flatness, collapse and size of many small networks against the generalization gap.

    python experiments/generalization_gap.py

Perceptrons learn 500 handwritten digits by SGD with momentum and a rate that falls to 0: every combination of learning
rate, batch size, width, weight decay (an L2 penalty) and share of wrong labels, from as many seeds, which choose the
images, the wrong labels, the start and the batches. The gap is that of the cross-entropy, and that of the error,
between 797 images that no network is trained on, whose labels are right, and those trained on, with the labels given.

Every network is measured on its training set, and none is left out: κ, κ̂ and κ_max of the head (larger is sharper),
the trace (by probes, with its standard error) and the largest eigenvalue (by Lanczos' method, with its residual) of the
Hessian in all parameters, ‖W‖_F of the head, NCC (0 is collapsed), the training loss, and the distance from where it
started. Kendall's τ and Spearman's ρ with each gap have 95 % bootstrap intervals over networks, and are also given with
the training loss held fixed. A network that diverged makes its correlations NaN, and is counted.

Writes to `runs/generalization_gap/<name>/`: `config.json`, `metrics.jsonl` (a line a network), `summary.json`,
`table.txt` and `figure.png`. Killed at any moment, the same command with --resume goes on with the same metrics.
"""

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from flatjax import (
    cross_entropy,
    max_relative_flatness,
    neural_collapse,
    relative_flatness,
    simplified_relative_flatness,
)
from flatjax.curvature import Hessian, extreme_eigenpairs, trace
from flatjax.models import MLP
from flatjax.run.options import RunOptions
from flatjax.run.progress import Progress
from flatjax.run.records import Record, RunFolder, number
from flatjax.run.tables import aligned
from harness.data import few_labels
from harness.data.batches import all_batches
from harness.generalization_gap.correlations import Correlation, correlations
from harness.results.style import plt, tidy
from harness.training.regularisers import REGULARISERS
from harness.training.small_networks import PARTS, Programs, State, TrainedNetwork, Trial, network

Gap = Literal["loss_gap", "error_gap"]

MEASURES: dict[str, str] = {
    "relative_flatness": "κ",
    "simplified_relative_flatness": "κ̂",
    "max_relative_flatness": "κ_max",
    "hessian_trace": "Tr H",
    "largest_eigenvalue": "λ_max",
    "head_norm": "‖W‖",
    "ncc": "NCC",
    "train_loss": "training loss",
    "distance": "distance from the start",
}
_DIRECTIONS = dict.fromkeys(
    ("relative_flatness", "simplified_relative_flatness", "max_relative_flatness", "hessian_trace"), "larger is sharper"
) | {"largest_eigenvalue": "larger is sharper", "ncc": "0 is collapsed"}
GAPS: dict[Gap, str] = {"loss_gap": "gap of the cross-entropy", "error_gap": "gap of the error"}


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """Train many small networks, and rank what is measured of them against how they generalize."""

    rates: tuple[float, ...] = (0.005, 0.015, 0.05)
    """Learning rates to combine."""
    batch_sizes: tuple[int, ...] = (16, 100)
    """Batch sizes to combine, in images per step."""
    widths: tuple[int, ...] = (24, 96)
    """Widths to combine, of both hidden layers."""
    decays: tuple[float, ...] = (0.0, 1e-3, 5e-3)
    """Strengths of the L2 penalty to combine."""
    noises: tuple[float, ...] = (0.0, 0.1, 0.3)
    """Shares of wrong labels in the training set to combine."""
    seeds: int = 2
    """Number of networks of each combination."""
    num_train: int = 500
    """Number of images to train on."""
    steps: int = 2000
    """Number of training steps."""
    num_probes: int = 32
    """Number of probes for the trace of the Hessian."""
    num_lanczos_steps: int = 24
    """Number of Lanczos steps for the Hessian's largest eigenvalue."""
    resamples: int = 1000
    """Number of bootstrap resamples."""
    folder: Path = Path("runs/generalization_gap")

    may_differ = frozenset({"resamples"})

    @property
    def default_name(self) -> str:
        return "digits"


def main(config: Config) -> None:
    """Train and measure whatever is not in the records yet, and report."""
    run = config.open_run()
    started = time.monotonic()
    groups = list(itertools.product(config.widths, config.batch_sizes))
    of_group = list(itertools.product(config.rates, config.decays, config.noises, range(config.seeds)))
    done = [len(in_group(run, width, batch)) == len(of_group) for width, batch in groups]
    with Progress("networks", {"network": len(of_group) * done.count(False)}) as progress:
        for (width, batch), is_done in zip(groups, done, strict=True):
            if not is_done:
                # A group is whole, or done anew: networks are trained several at a time.
                run.keep(lambda record, group=(width, batch): (record["width"], record["batch_size"]) != group)
                train_group(config, run, width, batch, of_group, progress)
    report(config, run)
    print(f"{time.monotonic() - started:.0f} s. The table and the figure are in {run.path}")


def in_group(run: RunFolder, width: int, batch: int) -> list[Record]:
    return [record for record in run.records if (record["width"], record["batch_size"]) == (width, batch)]


Combination = tuple[float, float, float, int]
"""A combination is a learning rate, a decay, a share of wrong labels and a seed."""


@functools.cache
def programs_of(config: Config, width: int) -> tuple[np.ndarray, TrainedNetwork, Programs, "Measurement"]:
    """Return the labels, and what trains and measures networks of one width, which is compiled once for all groups."""
    digits = few_labels.digits()
    pixels = ((digits.pixels - digits.pixels.mean()) / digits.pixels.std()).astype(np.float32)
    x = pixels.reshape(len(pixels), -1)
    of_width = network(lambda rngs: MLP((x.shape[1], width, width, few_labels.NUM_CLASSES), rngs=rngs))
    return digits.labels, of_width, Programs(of_width, x, config.steps), Measurement(config, of_width, jnp.asarray(x))


def train_group(
    config: Config, run: RunFolder, width: int, batch: int, combinations: list[Combination], progress: Progress
) -> None:
    """Train all networks of one shape and one batch size."""
    labels, of_width, programs, measure = programs_of(config, width)
    for start in range(0, len(combinations), programs.parallel.size):
        some = combinations[start : start + programs.parallel.size]
        trials = [trial(config, of_width, labels, batch, each) for each in some]
        states = jax.device_get(programs.train(REGULARISERS["weight_decay"], programs.parallel.stack(trials)))
        for i, (combination, of_trial) in enumerate(zip(some, trials, strict=True)):
            state = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), states)
            rate, decay, noise, seed = combination
            setting = {"width": width, "batch_size": batch, "learning_rate": rate, "weight_decay": decay}
            run.append(setting | {"noise": noise, "seed": seed} | measure(of_trial, state))
        progress.done("network", len(some), f"width {width}, batches of {batch}")


def trial(config: Config, of_width: TrainedNetwork, labels: np.ndarray, batch: int, combination: Combination) -> Trial:
    """Return what a seed decides, which is the same for all rates and decays, together with the setting."""
    rate, decay, noise, seed = combination
    drawn = few_labels.draw(labels, few_labels.Task(config.num_train, noise), 0, seed)
    parts = np.zeros(len(labels), np.int32)
    for place, part in enumerate(PARTS, start=1):
        parts[drawn.parts[part]] = place
    batches = all_batches(drawn.parts["train"], batch, config.steps, seed)
    return Trial(of_width.start(seed), drawn.labels, parts, batches, np.float32(rate), np.float32(decay))


class Measurement:
    """A measurement of one trained network is compiled once for a width."""

    def __init__(self, config: Config, of_width: TrainedNetwork, x: jax.Array):
        self.config, self.x = config, x
        graphdef = of_width.in_use

        def loss_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            return cross_entropy(nnx.merge(graphdef, params)(x), y).mean()

        @jax.jit
        def of_head(params: Any, x: jax.Array, y: jax.Array, x_test: jax.Array, y_test: jax.Array) -> Any:
            model = nnx.merge(graphdef, params)
            head, feats = params["head"], model.features(x)
            return {
                "relative_flatness": relative_flatness(head, feats, y),
                "simplified_relative_flatness": simplified_relative_flatness(head, feats, y),
                "max_relative_flatness": max_relative_flatness(head, feats, y),
                "head_norm": jnp.linalg.norm(head["kernel"]),
                "ncc": neural_collapse(head, feats, y, num_classes=few_labels.NUM_CLASSES).ncc,
                "train_loss": loss_fn(params, x, y),
                "test_loss": loss_fn(params, x_test, y_test),
                "train_error": _error(model(x), y),
                "test_error": _error(model(x_test), y_test),
            }

        self._loss_fn, self._of_head = loss_fn, of_head

    def __call__(self, of_trial: Trial, state: State) -> Record:
        chosen = {part: np.flatnonzero(of_trial.parts == place) for place, part in enumerate(PARTS, start=1)}
        x, y = self.x[chosen["train"]], jnp.asarray(of_trial.labels[chosen["train"]])
        test = self.x[chosen["test"]], jnp.asarray(of_trial.labels[chosen["test"]])
        params = state["params"]
        measured = jax.device_get(self._of_head(params, x, y, *test))
        record = {name: float(value) for name, value in measured.items()}
        key, hessian = jax.random.key(0), Hessian(self._loss_fn, params, (x, y))
        traced = trace(hessian, key, num_probes=self.config.num_probes)
        pair = extreme_eigenpairs(hessian, key, num_steps=self.config.num_lanczos_steps)
        return record | {
            "loss_gap": record["test_loss"] - record["train_loss"],
            "error_gap": record["test_error"] - record["train_error"],
            "hessian_trace": float(traced.value),
            "hessian_trace_standard_error": float(traced.standard_error),
            "largest_eigenvalue": float(pair.eigenvalues[0]),
            "largest_eigenvalue_residual": float(pair.residuals[0]),
            "distance": float(optax.tree.norm(optax.tree.sub(params, of_trial.start["params"]))),
        }


def _error(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the error rate, or NaN for a network that diverged."""
    wrong = jnp.mean((jnp.argmax(logits, axis=1) != labels).astype(logits.dtype))
    return jnp.where(jnp.all(jnp.isfinite(logits)), wrong, jnp.nan)


def report(config: Config, run: RunFolder) -> None:
    """Write the table, the figure and the summary."""
    records = run.records
    measures = {name: np.array([number(record[name]) for record in records]) for name in MEASURES}
    outcomes = {gap: np.array([number(record[gap]) for record in records]) for gap in GAPS}
    found = {
        gap: correlations(measures, outcome, "train_loss", num_resamples=config.resamples, seed=0)
        for gap, outcome in outcomes.items()
    }
    diverged = sum(not np.isfinite(number(record["train_loss"])) for record in records)
    fitted = sum(number(record["train_error"]) <= 0.01 for record in records)
    undefined = {MEASURES[name]: int(np.sum(~np.isfinite(values))) for name, values in measures.items()}
    lines = [
        f"{len(records)} networks, {diverged} of them diverged, {fitted} with at most 1 % of training errors; none is "
        "left out.",
        *(
            f"{name} is no number for {count} of them, and so has no correlation."
            for name, count in undefined.items()
            if count
        ),
        *(f"\n{name}\n{table(found[gap])}" for gap, name in GAPS.items()),
        f"\nIn brackets 95 % intervals of {config.resamples} bootstrap samples of the networks; 'given' is the partial "
        "coefficient given the training loss. Larger κ, κ̂, κ_max, Tr H and λ_max are "
        "sharper; an NCC of 0 is collapsed.",
    ]
    text = "\n".join(lines)
    print(text)
    (run.path / "table.txt").write_text(text + "\n")
    run.summarise({"num_networks": len(records), "num_diverged": diverged, "num_fitted": fitted} | found)
    draw(run.path / "figure.png", records, found)


def table(found: dict[str, dict[str, Correlation]]) -> str:
    """Format the correlations as a table with a row per measure."""
    kinds = {"kendall": "τ", "kendall_given": "τ given", "spearman": "ρ", "spearman_given": "ρ given"}
    cells = [["", *kinds.values()]]
    for name, of_measure in found.items():
        cells.append([MEASURES[name], *(_shown(of_measure.get(kind)) for kind in kinds)])
    return aligned(cells)


def _shown(of_measure: Correlation | None) -> str:
    return "" if of_measure is None else f"{of_measure[0]:+.2f} [{of_measure[1]:+.2f}, {of_measure[2]:+.2f}]"


def draw(path: Path, records: Sequence[Record], found: dict[Gap, dict[str, dict[str, Correlation]]]) -> None:
    """Draw the cross-entropy's gap against every measure, a point per network, coloured by share of wrong labels."""
    noises = sorted({record["noise"] for record in records})
    with plt.rc_context({"font.size": 8}):
        figure, all_axes = plt.subplots(3, 3, sharey=True, figsize=(9, 8), layout="constrained", dpi=150)
        for axes, (name, label) in zip(all_axes.ravel(), MEASURES.items(), strict=True):
            for place, noise in enumerate(noises):
                of_noise = [record for record in records if record["noise"] == noise]
                x, y = (np.array([number(record[key]) for record in of_noise]) for key in (name, "loss_gap"))
                colour = plt.get_cmap("viridis")(0.85 * place / max(len(noises) - 1, 1))
                axes.plot(x, y, "o", markersize=3, alpha=0.6, color=colour, markeredgewidth=0, label=f"{noise:.0%}")
            tau, given = (found["loss_gap"][name].get(kind) for kind in ("kendall", "kendall_given"))
            axes.set_title(f"τ {_shown(tau)}" + (f"\ngiven the loss {_shown(given)}" if given else ""), fontsize=7.5)
            positive = np.all([number(record[name]) > 0 for record in records])
            axes.set(
                xlabel=f"{label} ({_DIRECTIONS[name]})" if name in _DIRECTIONS else label,
                xscale="log" if positive else "symlog",
            )
            tidy(axes)
        for row in all_axes:
            row[0].set_ylabel(GAPS["loss_gap"])
        all_axes[0, 0].legend(title="wrong labels", frameon=False, fontsize=7)
        figure.suptitle(f"{len(records)} perceptrons on digits, with Kendall's τ and its 95 % interval")
        figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    # A device a core: small networks on two cores are trained in half the time two at a time.
    jax.config.update("jax_num_cpu_devices", min(os.cpu_count() or 1, 8))
    main(tyro.cli(Config))
