"""Measure what curvature and the flatness of hidden layers cost, as multiples of a gradient and of one another.

    python experiments/benchmark_layers.py probes   # a Hessian-vector product, its memory, and curvlinops beside it
    python experiments/benchmark_layers.py routes   # the flatness of all layers by two routes, and by the one chosen
    python experiments/benchmark_layers.py gauss-newton  # a draw of κ^GN of all layers, and its gradient
    python experiments/benchmark_layers.py stacked  # blocks in one stack that is scanned over, beside blocks one by one

Prints a table and writes the same figures to `runs/benchmark/<name>.json`. Every figure is a median over rounds in
which the functions take turns; a ratio is taken within a round, and stands with its quartiles. curvlinops is measured
where it is installed: `pip install torch==2.13.0 curvlinops-for-pytorch`.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from flatjax import flatness_profile, gauss_newton_flatness, layer_relative_flatness
from flatjax.curvature import Estimate, Hessian, trace
from flatjax.layers import find_layers
from flatjax.layers.names import in_forward_order
from flatjax.run.records import write_record
from harness.benchmarks.networks import LossProblem, decoder, perceptron, resnet, transformer
from harness.benchmarks.timing import side_by_side, temporary_memory
from harness.benchmarks.torch_peer import curvlinops_calls


def probes(num_probes: int = 16, seed: int = 0, seconds: float = 10, folder: Path = Path("runs/benchmark")) -> None:
    """Time probes of the Hessian of whole networks and of single layers against the gradient.

    Args:
        num_probes: number of probes at a time.
        seed: seed of the networks and the probes.
        seconds: least time for which each network is measured, in 5 rounds or more.
        folder: folder for the record.
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
            "gradient": partial(gradient_of, network.loss_fn),
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


def gauss_newton(seed: int = 0, seconds: float = 10, folder: Path = Path("runs/benchmark")) -> None:
    """Time a draw of κ^GN of all layers, and the gradient of a draw, against the gradient of the loss; and its memory.

    Args:
        seed: seed of the networks and the draws.
        seconds: least time for which each network is measured, in 5 rounds or more.
        folder: folder for the record.
    """
    record: list[dict[str, Any]] = []
    for name, make in DRAWN.items():
        network, key = make(seed), jax.random.key(seed)
        arguments = network.params, network.batches[0]
        draw = partial(drawn, network.outputs_fn, key)
        quarter = jax.tree.map(lambda x: x[: len(x) // 4], network.batches[0])
        functions: dict[str, tuple[Callable, tuple[Any, ...]]] = {
            "gradient of the loss": (partial(gradient_of, network.loss_fn), arguments),
            "a draw": (draw, arguments),
            "gradient of a draw": (jax.grad(draw), arguments),
            "gradient of a draw, a quarter": (jax.grad(draw), (network.params, quarter)),
        }
        calls = {each: partial(jax.jit(function), *given) for each, (function, given) in functions.items()}
        memory = {each: temporary_memory(function, given) for each, (function, given) in functions.items()}
        timings = side_by_side(calls, reference="gradient of the loss", min_seconds=seconds)
        of_gradient = memory["gradient of the loss"]
        for each, timing in timings.items():
            low, high = timing.ratio_quartiles
            print(
                f"{name:22} {each:30} {1e3 * timing.seconds:9.4g} ms  {timing.ratio:6.3f} [{low:.3f}, {high:.3f}] "
                f"gradients, temporary memory {memory[each] / 2**20:7.1f} MiB, {memory[each] / of_gradient:.2f} of its",
                flush=True,
            )
            record.append(
                {"network": name, "function": each, "seconds": timing.seconds, "gradients": timing.ratio}
                | {"quartiles": (low, high), "temporary_bytes": memory[each]}
            )
    write_record(folder / "gauss-newton.json", record)


DRAWN: dict[str, Callable[[int], LossProblem]] = {
    "perceptron, 4 layers": perceptron,
    "transformer, 6 blocks": partial(transformer, depth=6, width=256, context=128, vocab_size=512, num_batches=1),
    "ResNet-18, 32 × 32": partial(resnet, batch_size=8),
}


def drawn(outputs_fn: Any, key: jax.Array, params: Any, batch: Any) -> jax.Array:
    return gauss_newton_flatness(outputs_fn, params, *batch, key=key)


def gradient_of(loss_fn: Any, params: Any, batch: Any) -> Any:
    return jax.grad(loss_fn)(params, *batch)


def routes(
    relative_error: float = 0.3,
    max_probes: int = 256,
    networks: tuple[str, ...] = (),
    num_steps: int = 100,
    seed: int = 0,
    seconds: float = 60,
    folder: Path = Path("runs/benchmark"),
) -> None:
    """Time how long κ of every layer takes to a relative error: layer by layer, jointly, and by the chosen route.

    The routes take turns, and each round has other probes. Rounds are timed once every route was run and so compiled.

    Args:
        relative_error: relative error to reach.
        max_probes: largest number of probes per layer and batch.
        networks: beginnings of the names of the networks to measure; by default all.
        num_steps: steps of training before the measurement.
        seed: seed of the networks and the probes.
        seconds: least time for which each network is timed, in 2 rounds or more.
        folder: folder for the record.
    """
    record = []
    for name, make in NETWORKS.items():
        if not name.startswith(networks or name):
            continue
        network = make(seed).trained(num_steps)
        measure = partial(
            flatness_profile, network.loss_fn, network.params, network.batches, relative_error=relative_error,
            max_probes=max_probes,
        )  # fmt: skip
        for route in ROUTES:
            taken, _ = timed(measure, route, seed)
            print(f"{name:22} {route:9}  {taken:7.2f} s with compilation", flush=True)
        rounds: list[dict[str, tuple[float, dict[str, Estimate]]]] = []
        started = time.perf_counter()
        while len(rounds) < 2 or time.perf_counter() - started < seconds:
            rounds.append({route: timed(measure, route, seed + 1 + len(rounds)) for route in ROUTES})
        for route in ROUTES:
            of_route = [each[route][0] for each in rounds]
            over_best = [each[route][0] / min(each["layerwise"][0], each["joint"][0]) for each in rounds]
            profiles = [each[route][1] for each in rounds]
            probed = [[each for each in profile.values() if each.num_probes] for profile in profiles]
            reached = [
                max((float(each.standard_error / abs(each.value)) for each in layers), default=0.0) for layers in probed
            ]
            number = [sum(int(each.num_probes) for each in layers) for layers in probed]
            exact = len(profiles[0]) - len(probed[0])
            print(
                f"{name:22} {route:9}  {np.median(of_route):7.2f} s, {np.median(over_best):5.2f} of the better route; "
                f"{exact} of {len(profiles[0])} layers exact, {np.median(number):.0f} probes, "
                f"standard errors at most {np.median(reached):.1%}",
                flush=True,
            )
            record.append(
                {"network": name, "route": route, "seconds": of_route, "over_the_better": over_best, "probes": number}
                | {"largest_relative_errors": reached, "layers": len(profiles[0]), "exact": exact}
            )
    write_record(folder / "routes.json", record)


ROUTES = ("layerwise", "joint", "auto")


def timed(measure: Callable[..., dict[str, Estimate]], route: str, seed: int) -> tuple[float, dict[str, Estimate]]:
    started = time.perf_counter()
    profile = measure(route=route, key=jax.random.key(seed))
    return time.perf_counter() - started, profile


NETWORKS: dict[str, Callable[[int], LossProblem]] = {
    "perceptron, 4 layers": partial(perceptron, batch_size=128, num_batches=8),
    "ResNet-18, width 8": partial(resnet, batch_size=16, num_batches=8, width=8, size=16),
    "transformer, 12 blocks": partial(transformer, batch_size=4, num_batches=8, width=32, context=16, vocab_size=32),
}


def stacked(
    depth: int = 12,
    width: int = 32,
    batch_size: int = 4,
    context: int = 16,
    num_batches: int = 2,
    num_probes: int = 16,
    routes: tuple[str, ...] = ("joint",),
    rounds: int = 3,
    seed: int = 0,
    folder: Path = Path("runs/benchmark"),
) -> None:
    """Time the profile of one decoder whose blocks are leaves of their own, or slices of a stack, and compare κ.

    Both have the same weights, trained for a hundred steps, and probes of their own. The difference of κ of a layer
    in units of its standard error has mean square 1 if the two measure the same.

    Args:
        depth: number of blocks.
        width: width of the residual stream.
        batch_size: sequences per batch.
        context: tokens per sequence.
        num_batches: number of batches that the profile is measured on.
        num_probes: number of probes per layer and batch.
        routes: routes to measure layers by; "layerwise" compiles a program for each leaf.
        rounds: number of later calls; their median is reported.
        seed: seed of the networks and the probes.
        folder: folder for the record.
    """
    sizes = {"depth": depth, "width": width, "batch_size": batch_size, "context": context, "num_batches": num_batches}
    unrolled = decoder(seed, vocab_size=32, **sizes).trained(100)
    of_stack = decoder(seed, vocab_size=32, is_stacked=True, **sizes)
    networks = {"one by one": unrolled, "stacked": of_stack._replace(params=as_stack(unrolled.params))}
    record: list[dict[str, Any]] = []
    for route in routes:
        profiles: dict[str, dict[str, Estimate]] = {}
        for name, network in networks.items():
            measure = partial(flatness_profile, network.loss_fn, network.params, network.batches, num_probes=num_probes)
            first, profiles[name] = timed(measure, route, seed + len(profiles))
            later = [timed(measure, route, seed + len(profiles))[0] for _ in range(rounds)]
            print(
                f"{route:9} {name:10}  first {first:7.2f} s, later {np.median(later):6.2f} s "
                f"[{min(later):.2f}, {max(later):.2f}], {len(profiles[name])} layers",
                flush=True,
            )
            record.append({"route": route, "blocks": name, "first_seconds": first, "later_seconds": later})
        differences = in_standard_errors(profiles["one by one"], profiles["stacked"])
        print(
            f"{route:9} κ of {len(differences)} estimated layers differs by {np.max(np.abs(differences)):.2f} standard "
            f"errors at most, mean square {np.mean(np.square(differences)):.2f}"
        )
        record.append({"route": route, "differences_in_standard_errors": differences})
    write_record(folder / "stacked.json", record)


def as_stack(params: Any) -> dict[str, Any]:
    """Stack the parameters of a decoder's blocks, and keep its other parameters."""
    outer = {name: value for name, value in params.items() if name != "blocks"}
    blocks = [params["blocks"][i] for i in sorted(params["blocks"])]
    return {"outer": nnx.State(outer), "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def in_standard_errors(one_by_one: Mapping[str, Estimate], of_stack: Mapping[str, Estimate]) -> list[float]:
    """Return how far κ of each estimated layer of the blocks lies apart, in standard errors."""
    differences = []
    for name, (value, error, num_probes) in of_stack.items():
        if name.startswith("blocks") and num_probes:
            path, index = name.removesuffix("]").split("[")
            other = one_by_one[path.replace("blocks", f"blocks/{index}", 1)]
            differences.append(float((value - other.value) / np.hypot(error, other.standard_error)))
    return differences


def trace_of(loss_fn: Any, num_probes: int, key: jax.Array, params: Any, batch: Any) -> jax.Array:
    return trace(Hessian(loss_fn, params, batch), key, num_probes=max(num_probes, 2)).value


def kappa_of(loss_fn: Any, num_probes: int, key: jax.Array, layer: str, params: Any, batch: Any) -> jax.Array:
    options = {"key": key, "num_probes": num_probes, "method": "probes"}
    return layer_relative_flatness(loss_fn, params, *batch, layer=layer, **options).value


def first_and_last_layer(network: LossProblem) -> tuple[str, str]:
    """Name the first and the last layer between the embeddings and the head."""
    inner = [path for path in find_layers(network.params) if "head" not in path and "embedding" not in path]
    first, *_, last = in_forward_order(inner)
    return first, last


def beside_curvlinops(network: LossProblem, num_probes: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Time the same network and data in both libraries, in turn."""
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
    tyro.extras.subcommand_cli_from_dict(
        {"probes": probes, "gauss-newton": gauss_newton, "routes": routes, "stacked": stacked}
    )
