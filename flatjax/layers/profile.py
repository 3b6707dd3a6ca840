"""Relative flatness of every layer of a network: exactly where that is cheap, else by the cheaper of two routes."""

import collections
import functools
import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key

from flatjax.curvature.estimate import Estimate, exactly
from flatjax.curvature.leaves import Tree
from flatjax.curvature.streams import num_samples
from flatjax.layers.curvature import LayerCurvature, joint_probes
from flatjax.layers.kernels import Layer, find_layer, find_layers
from flatjax.layers.outputs import layer_outputs, try_layer_outputs


def flatness_profile(
    loss_fn: Callable[..., Any],
    params: Tree,
    batches: Iterable[tuple[Any, ...]],
    *,
    key: Key[Array, ""],
    layers: Sequence[str | Layer] | None = None,
    num_probes: int = 16,
    relative_error: float | None = None,
    max_probes: int = 1024,
    route: str = "auto",
    count: Callable[..., ArrayLike] | None = None,
    report: Callable[[dict[str, Estimate]], None] | None = None,
) -> dict[str, Estimate]:
    r"""Relative flatness κ of every layer of a network, on a whole data set, to see where it is flat.

    κ of a data set is the mean over its batches, weighted by their sizes; each batch is probed with draws of its own.
    A layer is measured exactly if nothing after it is a product of matrices, as with heads, or where that takes fewer
    products than probes are needed; the others by one of two routes, both unbiased:

    * "layerwise": one Hessian-vector product a layer and probe, restricted to the layer: for a late one nothing before
      it is differentiated. Each layer gets as many probes as it needs.
    * "joint": one product for all layers at once, v = (W_l A_l)_l and ⟨v_l, (H v)_l⟩, noisier by how the layers
      interact. All get the probes that the noisiest needs.

    "auto" draws half of `num_probes` of the first batch jointly, then of layer after layer until that is known to take
    longer, and takes the route that needs less time for the same relative error of all layers; what the other drew is
    thrown away. Compilation, of one program for each layer probed by itself, is not in that comparison: of a deep
    network and little data "joint" may be done earlier. With a `relative_error` the first probes decide how many follow
    them, so that the mean over all has a bias: of the order of `relative_error`² κ, more where draws are skewed, beside
    a standard error of `relative_error` κ. That the loss keeps its digits is up to `loss_fn`, as for
    `layer_relative_flatness`.

    Args:
        loss_fn: `(params, *batch) -> scalar`, the mean over a batch; twice differentiable, in forward mode too. One
            function for all calls.
        params: a tree of arrays: `nnx.state(model, nnx.Param)`, `variables["params"]`, or any other.
        batches: tuples of arrays, gone through once. Batches of the same shapes are compiled once.
        key: of the probes.
        layers: paths, or `Layer`s; by default all kernels and embeddings.
        num_probes: of a layer and batch, at least 4 and even, as they come in two blocks.
        relative_error: if given, probes of the first batch are drawn until their standard error is this share of κ,
            and as many of the others; `max_probes` a batch at most. What is reached is in the result, and may be
            somewhat above it. `batches` without a length are taken for one.
        max_probes: of a layer and batch.
        route: as above. Which one "auto" takes depends on timings: name one for the same numbers on every run.
        count: `(*batch) -> n_b`, how many samples its loss is the mean of; by default the length of its first array.
        report: called after each batch with what is known by then, to show progress.

    Returns:
        By path, in the order of the network's leaves: value, standard_error and num_probes (over all batches; 0 for an
        exact κ). The standard error is that of the probes; that the samples are a sample is not in it. NaN for a layer
        in which samples do not interact in the first batch, but do in another.

    Raises:
        ValueError: no layers, no batches, an unknown route, numbers of probes that do not fit, or a kernel that is used
            otherwise than it is read, as for `layer_relative_flatness`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import cross_entropy, flatness_profile
        >>> def loss(params, x, y):
        ...     logits = jnp.tanh(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
        ...     return cross_entropy(logits, y).mean()
        >>> keys, f32 = jax.random.split(jax.random.key(0), 4), jnp.float32
        >>> hidden, head = jax.random.normal(keys[0], (30, 40), f32), jax.random.normal(keys[1], (40, 5), f32)
        >>> params = {"hidden": {"kernel": hidden / 5}, "head": {"kernel": head}}
        >>> x, y = jax.random.normal(keys[2], (100, 30), f32), jnp.arange(100) % 5
        >>> batches = [(x[:60], y[:60]), (x[60:], y[60:])]
        >>> profile = flatness_profile(loss, params, batches, key=keys[0], relative_error=0.3)
        >>> for path, (value, error, probes) in profile.items():
        ...     print(path, "is exact" if probes == 0 else bool(error < value))
        head/kernel is exact
        hidden/kernel True

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021.
    """
    if route not in ("auto", "layerwise", "joint"):
        raise ValueError(f"route is {route!r}, wanted 'auto', 'layerwise' or 'joint'")
    if num_probes < 4 or num_probes % 2 or max_probes < num_probes:
        raise ValueError(
            f"num_probes is {num_probes} and max_probes {max_probes}, wanted an even number of at least 4, and no more "
            "than max_probes"
        )
    if relative_error is not None and not relative_error > 0:
        raise ValueError(f"relative_error is {relative_error}, wanted it above 0, or None for num_probes probes")
    found = [find_layer(params, layer)[0] for layer in (find_layers(params) if layers is None else layers)]
    if not found:
        raise ValueError("params has no layers: none of its leaves is called 'kernel' or 'embedding'")
    if len({layer.path for layer in found}) < len(found):
        raise ValueError("layers names a leaf twice, wanted one reading of each at a time")
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty, wanted at least one batch")
    prober = _Prober(loss_fn, params, num_probes // 2, key)
    # The errors of batches are independent: that of one may be larger than that of their mean.
    error = (relative_error or _USUAL_ERROR) * math.sqrt(len(batches) if isinstance(batches, Sized) else 1)
    plan, samples = _plan(prober, first, found, error, max_probes, route, to_the_end=relative_error is not None)
    wanted = plan.num_probes if relative_error else dict.fromkeys(plan.num_probes, num_probes)
    tallies = {layer: _Tally(layer in plan.exact) for layer in found}
    profile: dict[str, Estimate] = {}
    for batch in itertools.chain([first], rest):
        samples = prober.probes(batch, plan.groups, wanted, samples)
        samples |= {layer: prober.exactly(batch, layer, by) for layer, by in plan.exact.items()}
        for layer, values in samples.items():
            tallies[layer].add(num_samples(batch, count), values)
        samples = {}
        profile = {layer.path: tallies[layer].estimate() for layer in found}
        if report is not None:
            report(profile)
    return profile


_USUAL_ERROR = 0.1
"""That routes are compared at if none is asked for."""


class _Tally:
    """What is known of one layer: of each batch its size, and κ or draws that have it as their mean."""

    def __init__(self, is_exact: bool):
        self.is_exact = is_exact
        self.batches: list[tuple[float, np.ndarray]] = []

    def add(self, size: float, samples: np.ndarray) -> None:
        """A batch."""
        self.batches.append((size, samples))

    def estimate(self) -> Estimate:
        """The mean over the batches so far, each probed on its own."""
        total = sum(size for size, _ in self.batches)
        value = jnp.asarray(sum(size / total * samples.mean() for size, samples in self.batches))
        if self.is_exact:
            return exactly(value)
        variances = [(size / total) ** 2 * samples.var(ddof=1) / len(samples) for size, samples in self.batches]
        num_probes = sum(len(samples) for _, samples in self.batches)
        return Estimate(value, jnp.asarray(math.sqrt(sum(variances))), jnp.asarray(num_probes))


Group: TypeAlias = tuple[Layer, ...]
"""Layers that are probed together."""


class _Plan(NamedTuple):
    """How each layer is measured."""

    exact: dict[Layer, str]
    groups: list[Group]
    num_probes: dict[Layer, int]
    """Of a batch, for the layers of the groups."""


def _plan(
    prober: "_Prober",
    batch: tuple[Any, ...],
    layers: list[Layer],
    error: float,
    max_probes: int,
    route: str,
    *,
    to_the_end: bool,
) -> tuple[_Plan, dict[Layer, np.ndarray]]:
    """And what was drawn of the batch to make it: until the error is reached if it is to be."""
    least = 2 * prober.block
    exact = {layer: by for layer in layers if (by := prober.exact_route(batch, layer, least))}
    probed = [layer for layer in layers if layer not in exact]

    def grouped(layers: list[Layer]) -> list[Group]:
        return [tuple(layers)] if is_joint and layers else [(layer,) for layer in layers]

    def needed(samples: np.ndarray) -> int:
        mean, most = samples.mean(), max_probes // prober.block
        blocks = samples.var(ddof=1) / (error * mean) ** 2 / prober.block if mean else most
        return prober.block * math.ceil(min(max(2, blocks), most))  # in this order 2 if it is NaN

    is_joint, samples = route == "joint", dict[Layer, np.ndarray]()
    if route == "auto" and len(probed) > 1:
        is_joint, samples = _cheaper_route(prober, batch, probed, needed)
    numbers, are_enough = dict.fromkeys(probed, least), False
    while not are_enough:
        samples = prober.probes(batch, grouped(probed), numbers, samples)
        numbers = {layer: max(needed(samples[layer]), least) for layer in probed}
        exact |= {layer: by for layer, number in numbers.items() if (by := prober.exact_route(batch, layer, number))}
        probed = [layer for layer in probed if layer not in exact]
        numbers = {layer: numbers[layer] for layer in probed}
        are_enough = not to_the_end or all(numbers[layer] <= len(samples[layer]) for layer in probed)
    plan = _Plan(exact, grouped(probed), numbers)
    return plan, {layer: samples[layer] for layer in probed}


def _cheaper_route(
    prober: "_Prober", batch: tuple[Any, ...], layers: list[Layer], needed: Callable[[np.ndarray], int]
) -> tuple[bool, dict[Layer, np.ndarray]]:
    """Whether it is the joint one, and what it drew to show that."""
    joint, seconds = prober.timed(batch, tuple(layers))
    limit = seconds * max(needed(joint[layer]) for layer in layers)
    layerwise, cost = dict[Layer, np.ndarray](), 0.0
    for layer in layers:
        drawn, seconds = prober.timed(batch, (layer,))
        layerwise |= drawn
        cost += seconds * needed(drawn[layer])
        if cost > limit:
            return True, joint
    return False, layerwise


class _Prober:
    """Draws of κ, in blocks of the same size, so that each group of layers is compiled once."""

    def __init__(self, loss_fn: Callable[..., Any], params: Tree, block: int, key: Key[Array, ""]):
        self.loss_fn, self.params, self.block, self.key = loss_fn, params, block, key
        self.num_blocks = collections.Counter[Group]()

    def exact_route(self, batch: tuple[Any, ...], layer: Layer, num_probes: int | float) -> str | None:
        """One that takes no more products than probes are needed, or that of a head."""
        curvature = LayerCurvature(self.loss_fn, self.params, batch, layer)
        outputs = try_layer_outputs(self.loss_fn, self.params, batch, layer)
        is_cheap = outputs is not None and (outputs.is_last or curvature.rank <= num_probes)
        if is_cheap and _rows_are_apart(self.loss_fn, self.params, batch, layer):
            return "rows"
        return "weights" if curvature.num_directions <= num_probes else None

    def exactly(self, batch: tuple[Any, ...], layer: Layer, by: str) -> np.ndarray:
        """κ of one batch."""
        return np.asarray(_EXACTLY[by](self.loss_fn, self.params, batch, layer), float)[None]

    def probes(
        self, batch: tuple[Any, ...], groups: list[Group], wanted: dict[Layer, int], drawn: dict[Layer, np.ndarray]
    ) -> dict[Layer, np.ndarray]:
        """What was drawn of a batch, and further draws up to as many as the layer of a group that wants most."""
        samples = {layer: drawn.get(layer, np.empty(0)) for layer in wanted}
        for group in groups:
            number = max(wanted[layer] for layer in group)
            while len(samples[group[0]]) < number:
                for layer, more in self._block(batch, group).items():
                    samples[layer] = np.append(samples[layer], more)
        return samples

    def timed(self, batch: tuple[Any, ...], group: Group) -> tuple[dict[Layer, np.ndarray], float]:
        """A block of draws, and the seconds that one of its probes takes once it is compiled."""
        _probes.lower(self.loss_fn, self.params, batch, group, self._keys(group)).compile()
        started = time.perf_counter()
        samples = self._block(batch, group)
        return samples, (time.perf_counter() - started) / self.block

    def _block(self, batch: tuple[Any, ...], group: Group) -> dict[Layer, np.ndarray]:
        columns = np.asarray(_probes(self.loss_fn, self.params, batch, group, self._keys(group)), float).T
        self.num_blocks[group] += 1
        return dict(zip(group, columns, strict=True))

    def _keys(self, group: Group) -> Key[Array, " k"]:
        """Of its next block: the same whatever else is drawn."""
        of_group = jax.random.fold_in(self.key, zlib.crc32("\n".join(layer.path for layer in group).encode()))
        return jax.random.split(jax.random.fold_in(of_group, self.num_blocks[group]), self.block)


@functools.partial(jax.jit, static_argnames=("loss_fn", "group"))
def _probes(loss_fn, params, batch, group, keys) -> Float[Array, "k l"]:
    return joint_probes([LayerCurvature(loss_fn, params, batch, layer) for layer in group], keys)


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def _rows_are_apart(loss_fn, params, batch, layer) -> Bool[Array, ""]:
    outputs = layer_outputs(loss_fn, params, batch, layer)
    return LayerCurvature(loss_fn, params, batch, layer).rows_are_apart(outputs)


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def _by_rows(loss_fn, params, batch, layer) -> Float[Array, ""]:
    curvature, outputs = LayerCurvature(loss_fn, params, batch, layer), layer_outputs(loss_fn, params, batch, layer)
    is_apart = curvature.rows_are_apart(outputs)
    return jax.lax.cond(is_apart, lambda: curvature.by_rows(outputs), lambda: jnp.asarray(jnp.nan, curvature.dtype))


@functools.partial(jax.jit, static_argnames=("loss_fn", "layer"))
def _by_weights(loss_fn, params, batch, layer) -> Float[Array, ""]:
    return LayerCurvature(loss_fn, params, batch, layer).by_weights()


_EXACTLY = {"rows": _by_rows, "weights": _by_weights}
