"""What curvature and the flatness of hidden layers cost, as multiples of a gradient and of one another.

    python experiments/benchmark_layers.py probes   # a Hessian-vector product, its memory, and curvlinops beside it
    python experiments/benchmark_layers.py routes   # the flatness of all layers by two routes, and by the one chosen

Prints a table and writes the same figures to `runs/benchmark/<name>.json`. Every figure is a median over rounds in
which the functions take turns; a ratio is taken within a round, and stands with its quartiles. curvlinops is measured
where it is installed: `pip install torch==2.13.0 curvlinops-for-pytorch`.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from harness.networks import Network, perceptron, resnet, transformer
from harness.records import temporary_memory, write_record
from harness.timing import side_by_side
from harness.torch_peer import curvlinops_calls

from flatjax import flatness_profile, layer_relative_flatness
from flatjax.curvature.products import Hessian
from flatjax.curvature.traces import trace
from flatjax.layers.kernels import find_layers


def probes(num_probes: int = 16, seed: int = 0, seconds: float = 10, folder: Path = Path("runs/benchmark")) -> None:
    """Probes of the Hessian of whole networks and of single layers, against the gradient.

    Args:
        num_probes: at a time.
        seed: of networks and probes.
        seconds: how long each network is measured at least, in no fewer than 5 rounds.
        folder: where the record goes.
    """
    networks = {
        "perceptron, 4 layers": perceptron(seed),
        "transformer, 4 blocks": transformer(seed, depth=4, width=128, context=32),
        "ResNet-18, 32 × 32": resnet(seed, batch_size=8),
    }
    record: list[dict[str, Any]] = []
    for name, network in networks.items():
        batch, key = network.batches[0], jax.random.key(seed)
        layers = list(find_layers(network.params))
        first, last = first_and_last_layer(network)
        functions = {
            "gradient": lambda params, batch, loss_fn=network.loss_fn: jax.grad(loss_fn)(params, *batch),
            "trace": partial(trace_of, network.loss_fn, num_probes, key),
            f"κ of {first}": partial(kappa_of, network.loss_fn, num_probes, key, first),
            f"κ of {last}": partial(kappa_of, network.loss_fn, num_probes, key, last),
        }
        calls = {each: partial(jax.jit(function), network.params, batch) for each, function in functions.items()}
        timings = side_by_side(calls, reference="gradient", min_seconds=seconds)
        for each, timing in timings.items():
            number = 1 if each == "gradient" else num_probes
            low, high = (ratio / number for ratio in timing.ratio_quartiles)
            print(
                f"{name:22} {each:32} {1e3 * timing.seconds / number:9.4g} ms  "
                f"{timing.ratio / number:6.3f} gradients [{low:.3f}, {high:.3f}] a probe",
                flush=True,
            )
            record.append(
                {"network": name, "function": each, "probes": number, "gradients_a_probe": timing.ratio / number}
                | {"seconds": timing.seconds, "quartiles": (low, high), "layers": len(layers)}
            )
        for number in (1, 4, 16, 64):
            bytes_taken = temporary_memory(partial(trace_of, network.loss_fn, number, key), (network.params, batch))
            print(f"{name:22} trace by {number:3} probes: temporary memory {bytes_taken / 2**20:8.1f} MiB", flush=True)
            record.append({"network": name, "function": "trace", "probes": number, "temporary_bytes": bytes_taken})
    record += beside_curvlinops(networks["perceptron, 4 layers"], num_probes, seed, seconds)
    write_record(folder / "probes.json", record)


def routes(
    relative_error: float = 0.1, num_steps: int = 100, seed: int = 0, folder: Path = Path("runs/benchmark")
) -> None:
    """Seconds until κ of every layer is known to within a relative error: layer by layer, jointly, and as chosen.

    Each is run twice, with different probes, and the second run is reported: the first is compiled.

    Args:
        relative_error: that is asked for.
        num_steps: of training before.
        seed: of networks and probes.
        folder: where the record goes.
    """
    record = []
    for name, make in NETWORKS.items():
        network = make(seed).trained(num_steps)
        for route in ("layerwise", "joint", "auto"):
            measure = partial(
                flatness_profile, network.loss_fn, network.params, network.batches, relative_error=relative_error,
                max_probes=512, route=route,
            )  # fmt: skip
            seconds = []
            for run in range(3):
                started = time.perf_counter()
                profile = measure(key=jax.random.key(seed + run))
                seconds.append(time.perf_counter() - started)
            probed = [each for each in profile.values() if each.num_probes]
            reached = max((float(each.standard_error / abs(each.value)) for each in probed), default=0.0)
            number = sum(int(each.num_probes) for each in probed)
            print(
                f"{name:22} {route:9}  {np.median(seconds[1:]):8.2f} s, compiled in {seconds[0] - seconds[1]:6.1f} s; "
                f"{len(profile) - len(probed)} of {len(profile)} layers exact, {number} probes, "
                f"standard errors at most {reached:.1%}",
                flush=True,
            )
            record.append(
                {"network": name, "route": route, "seconds": seconds, "largest_relative_error": reached}
                | {"probes": number, "layers": len(profile), "exact": len(profile) - len(probed)}
            )
    write_record(folder / "routes.json", record)


NETWORKS: dict[str, Callable[[int], Network]] = {
    "perceptron, 4 layers": partial(perceptron, batch_size=128, num_batches=8),
    "ResNet-18, width 16": partial(resnet, batch_size=32, num_batches=8, width=16, size=16),
    "transformer, 12 blocks": partial(transformer, num_batches=8),
}


def trace_of(loss_fn: Any, num_probes: int, key: jax.Array, params: Any, batch: Any) -> jax.Array:
    return trace(Hessian(loss_fn, params, batch), key, num_probes=max(num_probes, 2)).value


def kappa_of(loss_fn: Any, num_probes: int, key: jax.Array, layer: str, params: Any, batch: Any) -> jax.Array:
    options = {"key": key, "num_probes": num_probes, "method": "probes"}
    return layer_relative_flatness(loss_fn, params, *batch, layer=layer, **options).value


def first_and_last_layer(network: Network) -> tuple[str, str]:
    """Of those between the embeddings and the head, in natural order: blocks/10 after blocks/9."""
    names = [path for path in find_layers(network.params) if "head" not in path and "embedding" not in path]
    names.sort(key=lambda path: [(int(part) if part.isdigit() else -1, part) for part in path.split("/")])
    return names[0], names[-1]


def beside_curvlinops(network: Network, num_probes: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    """The same network and data in both libraries, in turn."""
    (x, y), params = network.batches[0], network.params
    layers = [*(params["layers"][i] for i in sorted(params["layers"])), params["head"]]
    kernels, biases = ([np.asarray(layer[name][...]) for layer in layers] for name in ("kernel", "bias"))
    try:
        calls = curvlinops_calls(kernels, biases, np.asarray(x), np.asarray(y), num_probes)
    except ImportError as error:
        print(f"curvlinops is not measured: {error}; see --help")
        return []
    key, batch = jax.random.key(seed), (x, y)
    vectors = jax.tree.map(lambda leaf: jax.random.rademacher(key, (num_probes, *leaf.shape), leaf.dtype), params)
    products = jax.jit(lambda params, batch, vectors: Hessian(network.loss_fn, params, batch).products(vectors))
    calls["gradient, flatjax"] = partial(jax.jit(jax.grad(network.loss_fn)), params, *batch)
    calls["products, flatjax"] = partial(products, params, batch, vectors)
    timings = side_by_side(calls, reference="gradient, flatjax", min_seconds=seconds)
    rows = []
    for library, peer in (("flatjax", "flatjax"), ("curvlinops", "torch")):
        own = timings[f"products, {library}"].seconds / num_probes / timings[f"gradient, {peer}"].seconds
        both = timings[f"products, {library}"].ratio / num_probes
        print(f"{library:11} {num_probes} products: {own:.2f} of its own gradients each, {both:.2f} of ours")
        rows.append({"library": library, "own_gradients_a_probe": own, "our_gradients_a_probe": both})
    return rows


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"probes": probes, "routes": routes})
