"""What the metrics cost, side by side with the loss itself and with the published algorithm.

    python experiments/benchmark.py head      # κ of a head against its cross-entropy: about two minutes on 2 cores

Prints a table and writes the same figures to `runs/benchmark/<name>.json`. Every figure is a median over rounds in
which the functions take turns; a ratio is taken within a round, and stands with its quartiles.
"""

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from harness.timing import side_by_side

from flatjax import max_relative_flatness, relative_flatness, row_block_traces, simplified_relative_flatness

Batch = tuple[dict[str, jax.Array], jax.Array, jax.Array]


def head(seed: int = 0, seconds: float = 5.0, folder: Path = Path("runs/benchmark")) -> None:
    """κ of a softmax head and its variants, against the cross-entropy of the same data, and the published algorithm.

    Args:
        seed: of the data.
        seconds: how long each head is measured at least.
        folder: where the record goes.
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


def compare(functions: dict[str, Callable], batch: Batch, *, reference: str, seconds: float) -> list[dict[str, Any]]:
    """Times the jitted functions in turn, prints a row each, and returns the rows."""
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


def write_record(file: Path, rows: list[dict[str, Any]]) -> None:
    """The rows, with what they were measured on."""
    device = jax.devices()[0]
    machine = {"jax": jax.__version__, "platform": device.platform, "device": device.device_kind}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(machine | {"processor": platform.machine(), "rows": rows}, indent=2) + "\n")
    print(f"on {device.device_kind}, jax {jax.__version__}; the record is {file}")


def random_batch(num_outputs: int, num_features: int, num_samples: int, seed: int) -> Batch:
    """A head with logits of standard deviation 2 on normal features."""
    kernel_key, feats_key, labels_key = jax.random.split(jax.random.key(seed), 3)
    kernel = 2 * jax.random.normal(kernel_key, (num_features, num_outputs)) / num_features**0.5
    feats = jax.random.normal(feats_key, (num_samples, num_features))
    labels = jax.random.randint(labels_key, (num_samples,), 0, num_outputs)
    return {"kernel": kernel, "bias": jnp.zeros(num_outputs)}, feats, labels


def cross_entropy(params: dict[str, jax.Array], feats: jax.Array, labels: jax.Array) -> jax.Array:
    """What a training loop computes."""
    logits = feats @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def weight_by_weight(params: dict[str, jax.Array], feats: jax.Array, labels: jax.Array) -> jax.Array:
    """The published algorithm: a backward pass through the gradient a weight, then the traces of the row blocks.

    It is kinder than the published code in that it is compiled, and never holds the whole Hessian.
    """
    kernel, bias = params["kernel"], params["bias"]

    def gradient_entry(kernel: jax.Array, feature: jax.Array, output: jax.Array) -> jax.Array:
        return jax.grad(lambda kernel: cross_entropy({"kernel": kernel, "bias": bias}, feats, labels))(kernel)[
            feature, output
        ]

    def contribution(index: jax.Array) -> jax.Array:
        """Of the weight w_sk to Σ_s' ⟨w_s, w_s'⟩ Tr H_{s,s'}: its Hessian row at the same feature k of every row s'."""
        feature, output = jnp.divmod(index, kernel.shape[1])
        hessian_row = jax.grad(gradient_entry)(kernel, feature, output)
        return hessian_row[feature] @ (kernel.T @ kernel[:, output])

    return jnp.sum(jax.lax.map(contribution, jnp.arange(kernel.size)))


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"head": head})
