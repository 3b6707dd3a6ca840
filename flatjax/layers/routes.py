"""Choose how the layers of a network are measured: exactly where that is cheap, else by the cheaper of two routes."""

import collections
import functools
import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from flatjax.core.trees import Tree
from flatjax.layers.curvature import LayerCurvature, joint_probes
from flatjax.layers.kernels import Layer
from flatjax.layers.reading.outputs import LayerOutputs, layer_outputs, try_layer_outputs
from flatjax.layers.reading.program import Program

Group: TypeAlias = tuple[Layer, ...]
"""Layers that are probed together."""
Draws: TypeAlias = Float[np.ndarray, "_ _"]
"""Draws of κ (draws, layers): of the layers of a stack, or of one layer."""


class Plan(NamedTuple):
    """The way in which each layer is measured."""

    exact: dict[Layer, str]
    groups: list[Group]

    @property
    def probed(self) -> list[Layer]:
        return [layer for group in self.groups for layer in group]


def plan_routes(
    prober: "Prober",
    batch: tuple[Any, ...],
    needed: Callable[[Draws], float],
    max_probes: int,
    route: str,
    *,
    to_the_end: bool,
) -> tuple[Plan, dict[Layer, Draws]]:
    """Plans how each layer is measured, and returns what was drawn of the batch to decide it.

    `needed` says how many draws are wanted, going by those there are. If `to_the_end`, draws are added until there are
    as many.
    """
    # What the caller asked for as num_probes: a block is half of it.
    least = 2 * prober.block
    exact = prober.exact_routes(dict.fromkeys(prober.layers, least))
    probed = [layer for layer in prober.layers if layer not in exact]

    def grouped(layers: list[Layer]) -> list[Group]:
        return [tuple(layers)] if is_joint and layers else [(layer,) for layer in layers]

    def in_blocks(samples: Draws) -> int:
        return prober.block * math.ceil(min(max(least, needed(samples)), max_probes) / prober.block)

    is_joint, samples = route == "joint", dict[Layer, Draws]()
    if route == "auto" and len(probed) > 1:
        is_joint, samples = _cheaper_route(prober, batch, probed, in_blocks)
    numbers, are_enough = dict.fromkeys(probed, least), not to_the_end
    while not are_enough:
        samples = prober.probes(batch, grouped(probed), numbers, samples)
        # More draws know their own spread better, so each round asks anew. A noisy layer may come to need more probes
        # than its exact route takes products: it then leaves the probed ones, and a joint product need not carry it.
        numbers = {layer: in_blocks(samples[layer]) for layer in probed}
        exact |= prober.exact_routes(numbers)
        probed = [layer for layer in probed if layer not in exact]
        are_enough = all(numbers[layer] <= len(samples[layer]) for layer in probed)
    return Plan(exact, grouped(probed)), {layer: samples[layer] for layer in probed if layer in samples}


def _cheaper_route(
    prober: "Prober", batch: tuple[Any, ...], layers: list[Layer], in_blocks: Callable[[Draws], int]
) -> tuple[bool, dict[Layer, Draws]]:
    """Decides whether the joint route is the cheaper one, and returns the draws that showed it."""
    joint, seconds = prober.timed(batch, tuple(layers))
    limit = seconds * max(in_blocks(joint[layer]) for layer in layers)
    layerwise, cost = dict[Layer, Draws](), 0.0
    # By the golden ratio: however few come first, they are spread over the network and speak for the others.
    for number, place in enumerate(sorted(range(len(layers)), key=lambda place: place * 0.618034 % 1), 1):
        layer = layers[place]
        drawn, seconds = prober.timed(batch, (layer,))
        layerwise |= drawn
        cost += seconds * in_blocks(drawn[layer])
        # Given up as soon as layer by layer takes longer, or three layers say that all would take twice as long.
        if cost > limit or (number >= 3 and cost / number * len(layers) > 2 * limit):
            return True, joint
    return False, layerwise


class Prober:
    """Draws of κ, in blocks of the same size, so that each group of layers is compiled once."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        params: Tree,
        batch: tuple[Any, ...],
        program: Program,
        layers: Sequence[Layer],
        block: int,
        key: Key[Array, ""],
    ):
        self.loss_fn, self.params, self.block, self.key = loss_fn, params, block, key
        self.num_blocks = collections.Counter[Group]()
        self.first_batch = batch
        self.layers = list(layers)
        self.costs = {
            layer: _exact_costs(LayerCurvature(loss_fn, params, batch, layer), try_layer_outputs(program, layer))
            for layer in self.layers
        }

    def exact_routes(self, num_probes: dict[Layer, int]) -> dict[Layer, str]:
        """The exact routes of the layers that have one.

        They are heads, or layers for which it takes no more products than probes are needed.
        """
        routes = {layer: self._exact_route(layer, number) for layer, number in num_probes.items()}
        return {layer: by for layer, by in routes.items() if by is not None}

    def _exact_route(self, layer: Layer, num_probes: int) -> str | None:
        if self.costs[layer].rows <= num_probes:
            # Looking costs a program of its own, so it is done only where the route would be cheap, and only once.
            if _rows_are_apart(self.loss_fn, self.params, self.first_batch, layer):
                return "rows"
            self.costs[layer] = self.costs[layer]._replace(rows=math.inf)
        return "weights" if self.costs[layer].weights <= num_probes else None

    def exactly(self, batch: tuple[Any, ...], layer: Layer, by: str) -> Draws:
        """Measures the exact κ of one batch."""
        return np.asarray(_EXACTLY[by](self.loss_fn, self.params, batch, layer), float)[None]

    def probes(
        self,
        batch: tuple[Any, ...],
        groups: list[Group],
        wanted: Mapping[Layer, int | float],
        drawn: dict[Layer, Draws],
    ) -> dict[Layer, Draws]:
        """Adds to what was drawn of a batch as many draws as the layer of a group wants that wants most."""
        samples = {layer: drawn[layer] for layer in wanted if layer in drawn}
        for group in groups:
            number = max(wanted[layer] for layer in group)
            while len(samples.get(group[0], ())) < number:
                for layer, more in self._block(batch, group).items():
                    samples[layer] = np.concatenate([samples[layer], more]) if layer in samples else more
        return samples

    def timed(self, batch: tuple[Any, ...], group: Group) -> tuple[dict[Layer, Draws], float]:
        """A block of draws, and the seconds that a probe takes: in a second block if the first had to be compiled."""
        num_programs = _num_programs()
        samples, seconds = self._timed_block(batch, group)
        if _num_programs() > num_programs:
            more, seconds = self._timed_block(batch, group)
            samples = {layer: np.concatenate([samples[layer], more[layer]]) for layer in group}
        return samples, seconds

    def _timed_block(self, batch: tuple[Any, ...], group: Group) -> tuple[dict[Layer, Draws], float]:
        started = time.perf_counter()
        samples = self._block(batch, group)
        return samples, (time.perf_counter() - started) / self.block

    def _block(self, batch: tuple[Any, ...], group: Group) -> dict[Layer, Draws]:
        drawn = _probes(self.loss_fn, self.params, batch, group, self._keys(group))
        self.num_blocks[group] += 1
        return {layer: np.asarray(draws, float) for layer, draws in zip(group, drawn, strict=True)}

    def _keys(self, group: Group) -> Key[Array, " k"]:
        """The keys of a group's next block, which are the same whatever else is drawn."""
        of_group = jax.random.fold_in(self.key, zlib.crc32("\n".join(layer.path for layer in group).encode()))
        return jax.random.split(jax.random.fold_in(of_group, self.num_blocks[group]), self.block)


class _ExactCosts(NamedTuple):
    """The cost of each exact route in products; 0 for a route that is to be taken in any case."""

    rows: float
    weights: float


def _exact_costs(curvature: LayerCurvature, outputs: LayerOutputs | None) -> _ExactCosts:
    # Where attention follows rows hardly ever are apart, and a program a layer to look would take longest of all.
    if outputs is None or outputs.is_before_attention:
        rows = math.inf
    else:
        rows = 0.0 if outputs.is_last else float(curvature.rank)
    return _ExactCosts(rows, float(curvature.num_directions))


@functools.partial(jax.jit, static_argnames=("loss_fn", "group"))
def _probes(loss_fn, params, batch, group, keys) -> list[Float[Array, "k _"]]:
    layers = [LayerCurvature(loss_fn, params, batch, layer) for layer in group]
    # A stack that is probed alone is probed layer by layer.
    return joint_probes(layers, keys) if len(layers) > 1 else [layers[0].probes(keys)]


def _num_programs() -> int:
    """How many programs blocks of probes have been compiled to."""
    probes: Any = _probes
    return probes._cache_size()


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def _rows_are_apart(loss_fn, params, batch, layer) -> Bool[Array, ""]:
    outputs = layer_outputs(Program.of(loss_fn, params, batch), layer)
    return LayerCurvature(loss_fn, params, batch, layer).rows_are_apart(outputs)


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def _by_rows(loss_fn, params, batch, layer) -> Float[Array, " l"]:
    outputs = layer_outputs(Program.of(loss_fn, params, batch), layer)
    are_apart, kappas = LayerCurvature(loss_fn, params, batch, layer).by_rows(outputs)
    return jnp.where(are_apart, kappas, jnp.nan)


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def _by_weights(loss_fn, params, batch, layer) -> Float[Array, " l"]:
    return LayerCurvature(loss_fn, params, batch, layer).by_weights()


_EXACTLY = {"rows": _by_rows, "weights": _by_weights}
