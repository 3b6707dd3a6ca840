"""Measure what the metrics cost, side by side with the loss itself and with the published algorithm.

    python experiments/benchmark_head.py head        # κ of a head against its cross-entropy: two minutes on 2 cores
    python experiments/benchmark_head.py vocabulary  # the same for a language model's head, with its error: ten
    python experiments/benchmark_head.py growth      # time and memory against vocabulary and batch, a figure: ten
    python experiments/benchmark_head.py calls       # every public function outside of jit, against jitted: ten

Prints a table and writes the same figures to `runs/benchmark/<name>.json`. Every figure is a median over rounds in
which the functions take turns; a ratio is taken within a round, and stands with its quartiles.
"""

import functools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flatjax import (
    cross_entropy_and_flatness,
    max_relative_flatness,
    relative_flatness,
    row_block_traces,
    simplified_relative_flatness,
)
from flatjax.flatness.tiled.readout import FEWEST_ROWS, LOGITS_AT_ONCE
from flatjax.run.records import write_record
from harness.benchmarks.baselines import cross_entropy, tiled_cross_entropy, weight_by_weight
from harness.benchmarks.calls import Call, public_calls
from harness.benchmarks.growth import Growth, report_growth
from harness.benchmarks.timing import side_by_side, temporary_memory

Batch = tuple[dict[str, jax.Array], jax.Array, jax.Array]


def head(seed: int = 0, seconds: float = 5.0, folder: Path = Path("runs/benchmark")) -> None:
    """Time κ of a softmax head and its variants beside the cross-entropy of the same data and the published algorithm.

    Args:
        seed: seed of the random data.
        seconds: least time for which each head is measured.
        folder: folder for the record.
    """
    rows = []
    for num_outputs, num_features in [(10, 512), (97, 128), (1000, 2048)]:
        functions = {
            "cross-entropy": cross_entropy,
            "κ": relative_flatness,
            "κ̂": simplified_relative_flatness,
            "T": row_block_traces,
        }
        batch = random_batch(num_outputs, num_features, 4096, seed)
        rows += compare(functions, batch, reference="cross-entropy", seconds=seconds)
    for num_outputs, num_features, num_samples in [(10, 84, 10_000), (97, 128, 512)]:
        functions = {"κ": relative_flatness, "κ_max": max_relative_flatness, "κ weight by weight": weight_by_weight}
        batch = random_batch(num_outputs, num_features, num_samples, seed)
        rows += compare(functions, batch, reference="κ", seconds=seconds)
    write_record(folder / "head.json", rows)


def vocabulary(
    num_outputs: int = 50_257,
    num_features: int = 768,
    num_samples: int = 4096,
    tile_size: int | None = None,
    seed: int = 0,
    seconds: float = 30,
    folder: Path = Path("runs/benchmark"),
) -> None:
    """Measure κ of a language model's head: its error, its memory, and its time against that of the loss.

    Args:
        num_outputs: size V of the vocabulary.
        num_features: number m of features.
        num_samples: number N of tokens.
        tile_size: rows of the head that are read at a time, as in `cross_entropy_and_flatness`.
        seed: seed of the random data.
        seconds: least time for which the functions of each kind are measured, in 5 rounds or more.
        folder: folder for the record.
    """
    record: list[dict[str, Any]] = []
    for size, certainty in (*ERRORS_AT, (num_outputs, 0)):
        record.append(errors(size, certainty=certainty, seed=seed))

    tile = max(FEWEST_ROWS, LOGITS_AT_ONCE // num_samples) if tile_size is None else tile_size
    both = partial(cross_entropy_and_flatness, tile_size=tile)
    forward = {
        "cross-entropy": cross_entropy,
        "κ": partial(relative_flatness, tile_size=tile),
        "κ̂": partial(simplified_relative_flatness, tile_size=tile),
        "(cross-entropy, κ)": both,
    }
    backward = {
        "∇ tiled cross-entropy": value_and_gradient(partial(tiled_cross_entropy, tile_size=min(tile, num_outputs))),
        "∇ cross-entropy": value_and_gradient(cross_entropy),
        "∇ ours, without κ": value_and_gradient(lambda *batch: both(*batch)[0]),
        "∇ ours, κ given too": value_and_gradient(both, has_aux=True),
        "∇ (cross-entropy + κ/10)": value_and_gradient(lambda *batch: weighed(*both(*batch))),
    }
    batch = random_batch(num_outputs, num_features, num_samples, seed)
    logits = 4 * num_outputs * num_samples
    for name, function in (forward | backward).items():
        memory = temporary_memory(function, batch)
        print(
            f"{name:26}  temporary memory {memory / 2**20:8.1f} MiB = {memory / logits:.4f} of all logits", flush=True
        )
        record.append({"function": name, "temporary_bytes": memory, "share_of_logits": memory / logits})
    for functions in (forward, backward):
        record += compare(functions, batch, reference=next(iter(functions)), seconds=seconds)
    write_record(folder / "vocabulary.json", record)


ERRORS_AT = (*((size, 0) for size in (1, 2, 511, 512, 513, 1000)), *((1000, certainty) for certainty in (30, 60, 90)))
"""The error is measured at these sizes and certainties, and at the size of the vocabulary."""


def growth(seed: int = 0, num_features: int = 512, folder: Path = Path("runs/benchmark")) -> None:
    """Measure time and memory against the size of the vocabulary and of the batch, with their exponents and a figure.

    Args:
        seed: seed of the random data.
        num_features: number m of features.
        folder: folder for the record and the figure.
    """
    functions = {
        "cross-entropy": cross_entropy,
        "κ, 512 rows at a time": partial(relative_flatness, tile_size=512),
        "∇ (cross-entropy + κ/10)": value_and_gradient(lambda *batch: weighed(*cross_entropy_and_flatness(*batch))),
    }
    sweeps = {
        "V, at N = 1024": [(size, 1024) for size in (1000, 4000, 16_000, 64_000, 256_000)],
        "N, at V = 16,000": [(16_000, size) for size in (256, 1024, 4096, 16_384)],
    }
    record: list[dict[str, Any]] = []
    growths = []
    for axis, shapes in sweeps.items():
        sizes = [shape[0] if axis.startswith("V") else shape[1] for shape in shapes]
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        mebibytes: dict[str, list[float]] = {name: [] for name in functions}
        for num_outputs, num_samples in shapes:
            batch = random_batch(num_outputs, num_features, num_samples, seed)
            rows = compare(functions, batch, reference="cross-entropy", seconds=1)
            record += rows
            for row, (name, function) in zip(rows, functions.items(), strict=True):
                seconds[name].append(row["seconds"])
                mebibytes[name].append(temporary_memory(function, batch) / 2**20)
        growths += [Growth(axis, "seconds", sizes, seconds), Growth(axis, "temporary MiB", sizes, mebibytes)]
    title = f"A head of V outputs and {num_features} features on N samples"
    record += report_growth(folder / "growth.png", growths, title)
    write_record(folder / "growth.json", record)


def calls(
    num_samples: int = 1024,
    num_features: int = 64,
    num_classes: int = 50,
    seconds: float = 1.0,
    folder: Path = Path("runs/benchmark"),
) -> None:
    """Time a call of every public function outside of `jax.jit`: the first call, later ones, and a jitted one.

    Args:
        num_samples: number of samples in the batch.
        num_features: number m of features.
        num_classes: number C of classes.
        seconds: least time for which each function is measured.
        folder: folder for the record.
    """
    sizes = {"num_samples": num_samples, "num_features": num_features, "num_classes": num_classes}
    print(f"{'':36}  {'first':>10}  {'later':>10}  {'jitted':>10}   ms, and later ones in units of jitted ones")
    record = [sizes | cost_of(name, call, seconds) for name, call in public_calls(**sizes).items()]
    write_record(folder / "calls.json", record)


def cost_of(name: str, call: Call, seconds: float) -> dict[str, Any]:
    """Time a function's first call, with its compilation, and later calls in turn with jitted ones."""
    jax.clear_caches()
    started = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - started
    each = {"later": call} | ({"jitted": call.jitted()} if call.can_be_jitted else {})
    timings = side_by_side(each, reference=next(reversed(each)), min_seconds=seconds)
    later, jitted = timings["later"], timings.get("jitted")
    low, high = later.ratio_quartiles
    against = f"{1e3 * jitted.seconds:10.4g}  {later.ratio:6.3g} [{low:.3g}, {high:.3g}]" if jitted else f"{'—':>10}"
    print(f"{name:36}  {1e3 * first:10.4g}  {1e3 * later.seconds:10.4g}  {against}", flush=True)
    return {"function": name, "first": first, "later": later.seconds, "jitted": jitted and jitted._asdict()} | (
        {"ratio": later.ratio, "ratio_quartiles": later.ratio_quartiles} if jitted else {}
    )


def errors(
    num_outputs: int, *, certainty: float, seed: int, num_features: int = 512, num_samples: int = 64
) -> dict[str, Any]:
    """Return relative errors in float32 against float64, from sums of terms of one sign.

    Without certainty the features are random. Else they lie along their label's row, whose logit is near `certainty`.
    """
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(num_outputs, num_features)) / np.sqrt(num_features)
    labels = rng.integers(0, num_outputs, num_samples)
    feats = certainty * rows[labels] if certainty else 2 * rng.normal(size=(num_samples, num_features))
    rows, feats = rows.astype(np.float32), feats.astype(np.float32)
    kappa = exact_kappa(rows.astype(float), feats.astype(float))
    arguments = {"embedding": jnp.asarray(rows)}, jnp.asarray(feats), jnp.asarray(labels)
    measured = {tile: float(_kappa_in_tiles(tile)(*arguments)) for tile in (128, 512, num_outputs)}
    worst = max(abs(value - kappa) for value in measured.values()) / (kappa or 1)
    spread = (max(measured.values()) - min(measured.values())) / (kappa or 1)
    print(
        f"V = {num_outputs:6}, κ = {kappa:9.3g}: in tiles of 128 and 512 rows and at once off by at most {worst:.1e}, "
        f"apart by {spread:.1e}",
        flush=True,
    )
    return {"outputs": num_outputs, "kappa": kappa, "relative_error": worst, "spread_over_tile_sizes": spread}


@functools.cache
def _kappa_in_tiles(tile_size: int) -> Callable:
    return jax.jit(partial(relative_flatness, tile_size=tile_size))


def exact_kappa(rows: np.ndarray, feats: np.ndarray) -> float:
    """Compute κ sample by sample, with variances taken around the largest logit's row."""
    total = 0.0
    for feature in feats:
        logits = rows @ feature
        j = np.argmax(logits)
        p = np.exp(logits - logits[j])
        p /= p.sum()
        differences = rows - rows[j]
        total += feature @ feature * (p @ np.sum(differences**2, axis=1) - np.sum((p @ differences) ** 2))
    return total / len(feats)


def value_and_gradient(function: Callable, *, has_aux: bool = False) -> Callable:
    """Differentiate a function by the parameters and the features."""
    return jax.value_and_grad(function, argnums=(0, 1), has_aux=has_aux)


def weighed(loss: jax.Array, kappa: jax.Array) -> jax.Array:
    return loss + 0.1 * kappa


def compare(functions: dict[str, Callable], batch: Batch, *, reference: str, seconds: float) -> list[dict[str, Any]]:
    """Time the jitted functions in turn, print a row for each, and return the rows."""
    params, feats, _ = batch
    num_features, num_outputs = params["kernel"].shape
    size = f"{num_outputs}×{num_features}, N = {len(feats)}"
    calls = {name: partial(jax.jit(function), *batch) for name, function in functions.items()}
    timings = side_by_side(calls, reference=reference, min_seconds=seconds)
    for name, timing in timings.items():
        low, high = timing.ratio_quartiles
        ratio = f"{timing.ratio:8.4g} × {reference} [{low:.4g}, {high:.4g}]"
        print(f"{size:20}  {name:18}  {1e3 * timing.seconds:10.4g} ms  {ratio}", flush=True)
    return [{"size": size, "function": name, "reference": reference} | timings[name]._asdict() for name in timings]


def random_batch(num_outputs: int, num_features: int, num_samples: int, seed: int) -> Batch:
    """Draw a head with logits of standard deviation 2 on normal features."""
    kernel_key, feats_key, labels_key = jax.random.split(jax.random.key(seed), 3)
    kernel = 2 * jax.random.normal(kernel_key, (num_features, num_outputs)) / num_features**0.5
    feats = jax.random.normal(feats_key, (num_samples, num_features))
    labels = jax.random.randint(labels_key, (num_samples,), 0, num_outputs)
    return {"kernel": kernel, "bias": jnp.zeros(num_outputs)}, feats, labels


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"head": head, "vocabulary": vocabulary, "growth": growth, "calls": calls})
