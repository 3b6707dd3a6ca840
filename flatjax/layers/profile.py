"""Relative flatness of every layer of a network: exactly where that is cheap, else by the cheaper of two routes."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from flatjax.core.arrays import a_key
from flatjax.core.trees import Tree, leaves_by_path
from flatjax.curvature.counts import num_samples
from flatjax.curvature.estimate import Estimate, exactly
from flatjax.layers.kernels import Layer, paths_of
from flatjax.layers.reading.named import named_layers, read_layers
from flatjax.layers.reading.program import Program
from flatjax.layers.record import FlatnessProfile
from flatjax.layers.routes import Draws, Prober, plan_routes


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
    report: Callable[[FlatnessProfile], None] | None = None,
) -> FlatnessProfile:
    r"""Relative flatness κ of every layer of a network, on a whole data set, to see where it is flat.

    κ of a data set is the mean over its batches, weighted by their sizes. Larger is sharper. Each batch is probed with
    draws of its own. A layer is measured exactly if nothing after it is a product of matrices, as with heads, or where
    that takes fewer products than probes are needed. The others are measured by one of two routes, both unbiased:

    * "layerwise": one Hessian-vector product a layer and probe, restricted to the layer. For a late one nothing before
      it is differentiated. Each layer gets as many probes as it needs.
    * "joint": one product for all layers at once, v = (W_l A_l)_l and ⟨v_l, (H v)_l⟩, noisier by how the layers
      interact. All get the probes that the noisiest needs.

    The layers of a stack, several kernels in one array, are measured as if each were a leaf of its own, from one
    program for all of them. Each gets as many probes as the one that needs most. One joint product serves all layers of
    all stacks. A kernel that the program does not show how to read is left out, and does not keep the others from being
    measured.

    Args:
        loss_fn: `(params, *batch) -> scalar`, the mean over a batch; twice differentiable, in forward mode too. One
            function for all calls.
        params: a tree of arrays: `nnx.state(model, nnx.Param)`, `variables["params"]`, or any other.
        batches: tuples of arrays, gone through once. Batches of the same shapes are compiled once.
        key: the random key of the probes.
        layers: paths, or `Layer`s; by default all kernels and embeddings. Their axes are read off the program of the
            loss, as by `layer_relative_flatness`.
        num_probes: how many probes a layer and batch get, at least 4 and even, as they come in two blocks.
        relative_error: if given, so many probes are drawn that the standard error of the mean over all batches comes to
            about this share of κ. The first batch is probed until it has its part, each other as much as the batches
            before it and its own first probes call for. What is reached is in the result. If `batches` has no length,
            each is probed as if it were the only one.
        max_probes: how many probes a layer and batch get at most, in whole blocks of half of `num_probes`.
        route: one of the above, or "auto". Which one "auto" takes depends on timings: name one for the same numbers on
            every run.
        count: `(*batch) -> n_b`, how many samples its loss is the mean of; by default as many as its labels say, other
            than −100, times weights of their shape if there are any, see `flatjax.curvature.num_samples`.
        report: called after each batch with what is known by then, to show progress.

    Returns:
        A `FlatnessProfile`, a dictionary in the order of the network's leaves: value, standard_error and num_probes
        (over all batches; 0 for an exact κ) of each layer, under the path of its kernel, or "blocks/kernel[3]" for one
        of a stack. The standard error is that of the probes; that the samples are a sample is not in it. κ is NaN for a
        layer in which samples do not interact in the first batch, but do in another, and for a kernel that cannot be
        read, with the reason in `unread`.

    Raises:
        TypeError: a batch is no tuple.
        ValueError: no layers, no batches, an unknown route, numbers of probes that do not fit, or no kernel that can be
            read, for the reasons that `layer_relative_flatness` gives.

    Notes:
        "auto" draws some probes of the first batch jointly, then of layer after layer until that is expected to take
        longer. It takes the route that needs less time for the same relative error of all layers, or for `max_probes`;
        what the other drew is thrown away. Compilation, of one program for each layer probed by itself, is not in that
        comparison: for a deep network and little data "joint" may be done earlier.

        With a `relative_error` the first draws decide how many follow them, so that the mean over all has a bias. It is
        of the order of `relative_error`² κ, more where draws are skewed, beside a standard error of `relative_error` κ.

        κ keeps its digits only if the loss does, which is up to `loss_fn`, as for `layer_relative_flatness`.

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
        >>> profile = flatness_profile(loss, params, batches, key=keys[0], num_probes=16)
        >>> for path, (value, error, probes) in profile.items():
        ...     print(path, "is exact" if probes == 0 else f"is the mean of {probes} probes")
        head/kernel is exact
        hidden/kernel is the mean of 32 probes

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
    a_key(key)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("batches is empty, wanted at least one batch")
    if not isinstance(first, tuple):
        raise TypeError(f"a batch is a {type(first).__name__}, wanted a tuple of what loss_fn takes: batches=[(x, y)]")
    program = Program.of(loss_fn, params, first)
    named = named_layers(program, params, layers)
    read, unread = read_layers(program, named)
    prober = Prober(loss_fn, params, first, program, read, num_probes // 2, key)
    most = max_probes // prober.block * prober.block
    # The errors of batches are independent: that of one may be larger than that of their mean.
    error = (relative_error or _USUAL_ERROR) * math.sqrt(len(batches) if isinstance(batches, Sized) else 1)

    def needed_first(samples: Draws) -> float:
        return _Tally(is_exact=False).needed(1.0, samples, error)

    plan, samples = plan_routes(prober, first, needed_first, most, route, to_the_end=relative_error is not None)
    tallies = {layer: _Tally(layer in plan.exact) for layer in read}

    def known() -> FlatnessProfile:
        return _profile(params, paths_of(params, named), {layer.path: layer for layer in read}, tallies, unread)

    for batch in itertools.chain([first], rest):
        size = num_samples(batch, count)
        if size == 0:
            continue
        samples = prober.probes(batch, plan.groups, dict.fromkeys(plan.probed, num_probes), samples)
        if relative_error is not None:
            # Once a batch: of draws that were looked at one after another until they are enough, the mean is biased.
            wanted = {layer: min(tallies[layer].needed(size, samples[layer], error), most) for layer in plan.probed}
            samples = prober.probes(batch, plan.groups, wanted, samples)
        samples |= {layer: prober.exactly(batch, layer, by) for layer, by in plan.exact.items()}
        for layer, values in samples.items():
            tallies[layer].add(size, values)
        samples = {}
        if report is not None:
            report(known())
    if not any(tally.batches for tally in tallies.values()):
        raise ValueError("count is 0 for every batch, wanted one of some samples at least")
    return known()


def _profile(
    params: Tree,
    paths: Sequence[str],
    layers: Mapping[str, Layer],
    tallies: Mapping[Layer, "_Tally"],
    unread: Mapping[str, str],
) -> FlatnessProfile:
    """Makes the profile in the order of the paths, one layer of a stack after another."""
    leaves = leaves_by_path(params)
    estimates: dict[str, Estimate] = {}
    for path in paths:
        if path in unread:
            estimates[path] = exactly(jnp.asarray(jnp.nan))
        else:
            names = layers[path].names(jnp.shape(leaves[path]))
            estimates |= dict(zip(names, tallies[layers[path]].estimates(), strict=True))
    return FlatnessProfile(estimates.items(), unread)


_USUAL_ERROR = 0.1
"""The relative error at which routes are compared if none is asked for."""


class _Batch(NamedTuple):
    """What is kept of a batch: its size, and the number, the mean and the variance of its draws of each layer."""

    size: float
    number: int
    mean: Float[np.ndarray, " l"]
    variance: Float[np.ndarray, " l"]

    @classmethod
    def of(cls, size: float, samples: Draws) -> "_Batch":
        mean = samples.mean(axis=0)
        return cls(size, len(samples), mean, samples.var(axis=0, ddof=1) if len(samples) > 1 else np.zeros_like(mean))


class _Tally:
    """What is known of the layers of a stack, or of one: of each batch κ, or draws with it as mean."""

    def __init__(self, is_exact: bool):
        self.is_exact = is_exact
        self.batches: list[_Batch] = []

    def add(self, size: float, samples: Draws) -> None:
        """Adds a batch of so many samples."""
        self.batches.append(_Batch.of(size, samples))

    def needed(self, size: float, samples: Draws, error: float) -> float:
        """How many draws of a further batch bring it to a relative error, going by these first ones; 0 if it is NaN.

        The mean is that of the batches before, which these draws cannot have moved. In a stack it is the number for the
        layer that needs most.
        """
        further = _Batch.of(size, samples)
        batches = [*self.batches, further]
        # Draws that happen to lie together have a small variance: what was seen before counts too.
        pooled = sum(each.size**2 * each.variance for each in batches) / sum(each.size**2 for each in batches)
        variance = np.maximum(further.variance, pooled)
        known = self.batches or batches
        mean = sum(each.size * each.mean for each in known) / sum(each.size for each in known)
        usual_size = sum(each.size for each in batches) / len(batches)
        with np.errstate(divide="ignore", invalid="ignore"):
            number = (size / usual_size) ** 2 * variance / (error * mean) ** 2
        return float(np.max(np.where(np.isnan(variance + mean) | (variance == 0), 0.0, number)))

    def estimates(self) -> list[Estimate]:
        """The mean over the batches so far, each probed on its own, of each layer."""
        total = sum(each.size for each in self.batches)
        values = np.sum([each.size / total * each.mean for each in self.batches], axis=0)
        if self.is_exact:
            return [exactly(jnp.asarray(value)) for value in values]
        variances = np.sum([(each.size / total) ** 2 * each.variance / each.number for each in self.batches], axis=0)
        num_probes = sum(each.number for each in self.batches)
        return [
            Estimate(jnp.asarray(value), jnp.asarray(error), jnp.asarray(num_probes))
            for value, error in zip(values, np.sqrt(variances), strict=True)
        ]
