"""Measure what neural collapse costs at the size of a vocabulary, beside the least possible cost and another library.

    python experiments/benchmark_collapse.py vocabulary    # 50,257 classes of 768 features: 4 min on 2 cores
    python experiments/benchmark_collapse.py growth        # with the classes, features and samples: 3 min

Prints a table and writes the same figures to `runs/benchmark/collapse_<name>.json`. Every time is a median over rounds
in which the functions take turns; a ratio is taken within a round, and stands with its quartiles. The one-hot products
that rhubarbwu/neural-collapse updates by are measured in torch where it is installed: `pip install torch==2.13.0`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from flatjax.collapse import ClassMoments, cdnv
from flatjax.run.records import write_record
from harness.benchmarks.growth import Growth, report_growth
from harness.benchmarks.timing import Timing, side_by_side, temporary_memory
from harness.benchmarks.torch_peer import one_hot_update


def vocabulary(
    num_classes: int = 50_257,
    num_features: int = 768,
    num_tokens: int = 2048,
    seed: int = 0,
    seconds: float = 20,
    folder: Path = Path("runs/benchmark"),
) -> None:
    """Time an update by a batch beside a bare sum by classes, and CDNV over all pairs beside products of matrices.

    Args:
        num_classes: number C of classes.
        num_features: number m of features.
        num_tokens: number of tokens in the batch.
        seed: seed of the random data.
        seconds: least time for which updates are measured.
        folder: folder for the record.
    """
    feats, labels = batch(num_classes, num_features, num_tokens, seed)
    moments = filled(num_classes, num_features, seed)
    sums = jax.jit(partial(jax.ops.segment_sum, num_segments=num_classes))
    calls: dict[str, Callable[[], Any]] = {
        "segment_sum": partial(sums, feats, labels),
        "update, in place": Updating(num_classes, num_features, feats, labels),
        "update, into a copy": partial(jax.jit(ClassMoments.update), moments, feats, labels),
    }
    try:
        calls["one-hot products, torch"] = one_hot_update(np.asarray(feats), np.asarray(labels), num_classes)
    except ImportError as error:
        print(f"one-hot products are not measured: {error}; see --help")
    record = table(side_by_side(calls, reference="segment_sum", min_seconds=seconds), "segment_sum")

    product = jnp.ones((4096, num_features)), jnp.ones((num_features, 4096))
    timings = side_by_side(
        {"product of matrices": partial(jax.jit(jnp.matmul), *product), "CDNV": partial(cdnv, moments)},
        reference="product of matrices",
        min_seconds=0,
        min_rounds=3,
    )
    record += table(timings, "product of matrices")
    rate = 2 * 4096**2 * num_features / timings["product of matrices"].seconds
    reached = num_classes * (num_classes - 1) * num_features / timings["CDNV"].seconds
    mebibytes = temporary_memory(cdnv, (moments,)) / 2**20
    print(
        f"CDNV over {num_classes * (num_classes - 1) // 2:,} pairs: {reached / 1e9:.0f} of {rate / 1e9:.0f} GFLOP/s of "
        f"products in float32, {reached / rate:.0%}; temporary memory {mebibytes:.0f} MiB"
    )
    record.append({"cdnv_flops": reached, "product_flops": rate, "temporary_mebibytes": mebibytes})
    write_record(folder / "collapse_vocabulary.json", record)


def growth(seed: int = 0, folder: Path = Path("runs/benchmark")) -> None:
    """Measure CDNV against the classes and the features, and an update's time against the classes and the samples.

    Args:
        seed: seed of the random data.
        folder: folder for the record and the figure.
    """
    growths = []
    for axis, shapes in {
        "C, at m = 256": [(size, 256) for size in (1000, 2000, 4000, 8000, 16_000)],
        "m, at C = 4000": [(4000, size) for size in (64, 128, 256, 512, 1024)],
    }.items():
        sizes = [shape[0] if axis.startswith("C") else shape[1] for shape in shapes]
        moments = [filled(*shape, seed) for shape in shapes]
        seconds = [seconds_of(partial(cdnv, each)) for each in moments]
        mebibytes = [temporary_memory(cdnv, (each,)) / 2**20 for each in moments]
        growths += [
            Growth(axis, "seconds", sizes, {"CDNV": seconds}),
            Growth(axis, "temporary MiB", sizes, {"CDNV": mebibytes}),
        ]
    for axis, shapes in {
        "C, at N = 2048, m = 256": [(size, 2048) for size in (1000, 4000, 16_000, 64_000, 256_000)],
        "N, at C = 16,000, m = 256": [(16_000, size) for size in (256, 1024, 4096, 16_384)],
    }.items():
        sizes = [shape[0] if axis.startswith("C") else shape[1] for shape in shapes]
        seconds = [
            seconds_of(Updating(num_classes, 256, *batch(num_classes, 256, num_tokens, seed)))
            for num_classes, num_tokens in shapes
        ]
        growths.append(Growth(axis, "seconds", sizes, {"update, in place": seconds}))
    record = report_growth(
        folder / "collapse_growth.png", growths, "Moments of C classes of m features, N samples a batch"
    )
    write_record(folder / "collapse_growth.json", record)


class Updating:
    """Moments are updated by the same batch at each call, in place."""

    def __init__(self, num_classes: int, num_features: int, feats: jax.Array, labels: jax.Array):
        self.moments, self.batch = ClassMoments.init(num_classes, num_features), (feats, labels)
        self.update = jax.jit(ClassMoments.update, donate_argnums=0)

    def __call__(self) -> ClassMoments:
        self.moments = self.update(self.moments, *self.batch)
        return self.moments


def batch(num_classes: int, num_features: int, num_tokens: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Draw labels as words are: a few classes often, and many rarely."""
    rng = np.random.default_rng(seed)
    labels = (rng.zipf(1.2, num_tokens) - 1) % num_classes
    return jnp.asarray(rng.normal(size=(num_tokens, num_features)), jnp.float32), jnp.asarray(labels, jnp.int32)


def filled(num_classes: int, num_features: int, seed: int) -> ClassMoments:
    """Fill the moments with two samples of each class, a batch at a time."""
    moments, update = ClassMoments.init(num_classes, num_features), jax.jit(ClassMoments.update, donate_argnums=0)
    rng = np.random.default_rng(seed)
    for classes in np.array_split(np.arange(num_classes), -(-num_classes // 4096)):
        means = rng.normal(size=(len(classes), num_features))
        for _ in range(2):
            feats = means + 0.1 * rng.normal(size=means.shape)
            moments = update(moments, jnp.asarray(feats, jnp.float32), jnp.asarray(classes, jnp.int32))
    return moments


def seconds_of(call: Callable[[], Any]) -> float:
    return side_by_side({"it": call}, reference="it", min_seconds=0.5)["it"].seconds


def table(timings: dict[str, Timing], reference: str) -> list[dict[str, Any]]:
    """Print each row, and return the rows."""
    for name, timing in timings.items():
        low, high = timing.ratio_quartiles
        ratio = f"{timing.ratio:8.3g} × {reference} [{low:.3g}, {high:.3g}]"
        print(f"{name:26} {1e3 * timing.seconds:10.4g} ms  {ratio}", flush=True)
    return [{"function": name, "reference": reference} | timing._asdict() for name, timing in timings.items()]


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"vocabulary": vocabulary, "growth": growth})
