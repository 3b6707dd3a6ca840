"""The Gauss-Newton relative flatness of every layer, on a whole data set."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from flatjax.core.arrays import a_key
from flatjax.core.integers import whole_number
from flatjax.core.trees import Tree, leaves_by_path
from flatjax.layers.gauss_newton.cotangents import Loss, check_loss
from flatjax.layers.gauss_newton.draws import Pulled, Sizes, gram_of, sum_of
from flatjax.layers.kernels import Layer, paths_of
from flatjax.layers.reading.named import named_layers, read_layers
from flatjax.layers.reading.program import Program
from flatjax.layers.record import GaussNewtonFlatness, GaussNewtonProfile


def gauss_newton_profile(
    outputs_fn: Callable[..., Any],
    params: Tree,
    batches: Iterable[tuple[Any, ...]],
    *,
    key: Key[Array, ""],
    loss: Loss = "softmax_cross_entropy",
    layers: Sequence[str | Layer] | None = None,
    num_draws: int = 2,
    relative_error: float | None = None,
    max_draws: int = 64,
    report: Callable[[GaussNewtonProfile], None] | None = None,
) -> GaussNewtonProfile:
    r"""Gauss-Newton relative flatness κ^GN of all layers at once, for about one gradient a draw.

        κ^GN = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr GN_{s,s'} = E ‖Wᵀ g‖_F² / N,    g = Σ_i J_iᵀ u_i,    E u_i u_iᵀ = G_i

    with GN = Σ_i J_iᵀ G_i J_i / N the Gauss-Newton matrix in the place of the Hessian in κ: J_i is the derivative of
    the logits of sample i in the weights, and G_i the Hessian of its loss in its logits. One reverse pass with random
    cotangents u serves all layers. κ^GN is at least 0, larger is sharper, and it does not depend on the labels where G
    does not, as that of the cross-entropy. It equals κ for a head, and for every dense layer or convolution of a
    piecewise linear network (ReLU, max-pooling, normalisation with fixed statistics). Elsewhere the two differ, and
    `flatness_profile` gives κ.

    Args:
        outputs_fn: `(params, *batch) -> logits (..., d)`, or `(logits, weights)` with one weight a sample, 0 for
            padding. For a large vocabulary the logits may be `TiledLogits(feats, head)`, which are never made at once.
            Batch statistics and dropout have to be fixed in it, as for `layer_relative_flatness`. One function for all
            calls: each is compiled once.
        params: a tree of arrays, of any framework.
        batches: tuples of arrays, gone through once. Batches of the same shapes are compiled once. Where there are only
            logits, of the cross-entropy, samples count as `flatjax.curvature.num_samples` says if the labels it finds
            have their shape: a token with the label −100 does not. Return weights where logits are shifted or flat.
        key: the random key of the draws.
        loss: "softmax_cross_entropy", "squared_error" (‖z − y‖²/2), "sigmoid_cross_entropy", or a callable
            `(logits, *batch) -> (...,)`, a loss of each sample that is convex in its own logits; it takes d products a
            draw.
        layers: paths, or `Layer`s; by default all kernels and embeddings. Their axes are read off the program, as by
            `layer_relative_flatness`; an embedding that is tied to the head is read as `layers` say. What cannot be
            read is left out.
        num_draws: how many draws a batch gets, at least 2.
        relative_error: if given, so many draws are made of each batch that the standard error of its κ^GN, given the
            data, comes to about this share of it, times the root of the number of batches. The mean over batches of
            equal size and κ^GN then has this relative error, and over others a larger one; what is reached is in the
            result. A batch gets what its own first draws call for, of which there are at least 8.
        max_draws: how many draws a batch gets at most, but for filling up the last round of as many as the first.
        report: called after each batch with what is known by then, to show progress.

    Returns:
        A `GaussNewtonProfile`, a dictionary in the order of the network's leaves: for each layer, under the path of its
        kernel or "blocks/kernel[3]", value, standard_error (of the draws), data_error (over batches), simplified
        (κ̂^GN), trace and num_draws. It is the mean over all samples. What cannot be read is NaN, with the reason in
        `unread`.

    Raises:
        TypeError: a batch is no tuple, the key is none, or the logits are not floating.
        ValueError: no batches, no layers, none that can be read, an unknown loss or one that is not convex in the
            logits, numbers of draws that do not fit, or weights that are not one a sample.

    Notes:
        A draw costs a backward pass, and 2·m·d·min(m, d) operations a kernel (m, d); a batch one forward pass more. No
        second derivative is taken, and no gradient of a single sample. Samples and parameters may be split among
        devices where the compiler splits the work (`AxisType.Auto`); on a mesh with explicit axes split parameters
        raise an error of JAX. Parameters may be in bfloat16: what is squared is in float32. Two draws of one batch
        hardly know their own spread; believe errors of many batches or draws.

        With a `relative_error` the first draws decide how many follow, for a bias of the order of `relative_error`².

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import gauss_newton_profile
        >>> def logits(params, x, y):
        ...     return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
        >>> keys, f32 = jax.random.split(jax.random.key(0), 4), jnp.float32
        >>> hidden, head = jax.random.normal(keys[0], (30, 40), f32), jax.random.normal(keys[1], (40, 5), f32)
        >>> params = {"hidden": {"kernel": hidden / 5}, "head": {"kernel": head}}
        >>> x, y = jax.random.normal(keys[2], (100, 30), f32), jnp.arange(100) % 5
        >>> profile = gauss_newton_profile(logits, params, [(x[:60], y[:60]), (x[60:], y[60:])], key=keys[3])
        >>> for path, estimate in profile.items():
        ...     print(path, estimate.num_draws, bool(estimate.value > estimate.standard_error > 0))
        head/kernel 4 True
        hidden/kernel 4 True

    References:
        Petzka, Kamp, Adilova, Sminchisescu, Boley: *Relative Flatness and Generalization*, NeurIPS 2021 (κ).
        Schraudolph: *Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent*, 2002 (GN).
    """
    a_key(key)
    check_loss(loss)
    num_draws, max_draws = whole_number(num_draws, "num_draws", least=2), whole_number(max_draws, "max_draws")
    if max_draws < num_draws:
        raise ValueError(f"max_draws is {max_draws}, wanted at least num_draws, {num_draws}")
    if relative_error is not None and not relative_error > 0:
        raise ValueError(f"relative_error is {relative_error}, wanted it above 0, or None for num_draws draws")
    measure: _Measure | None = None
    tally = Tally()
    for batch in batches:
        if not isinstance(batch, tuple):
            raise TypeError(f"a batch is a {type(batch).__name__}, wanted a tuple of what outputs_fn takes: [(x, y)]")
        measure = measure or _Measure(outputs_fn, params, batch, layers, loss, key)
        # Fewer draws do not know their own spread, by which the number of further ones is chosen.
        first = num_draws if relative_error is None else min(max(num_draws, _FIRST_DRAWS), max_draws)
        size, draws = measure.draws(batch, first)
        if size == 0:
            continue
        if relative_error is not None:
            # The errors of batches are independent: that of one may be larger than that of their mean.
            error = relative_error * math.sqrt(len(batches) if isinstance(batches, Sized) else 1)
            number = min(_needed(draws.value, error), max_draws) - first
            for _ in range(0, number, first):
                draws += measure.draws(batch, first)[1]
        if callable(loss) and not np.isfinite(draws.value).all():
            raise ValueError(f"loss, {loss!r}, is not convex in the logits or not finite: κ^GN is of convex losses")
        tally.add(size, draws)
        if report is not None:
            report(measure.profile(tally))
    if measure is None:
        raise ValueError("batches is empty, wanted at least one batch")
    if not tally.batches:
        raise ValueError("no sample of any batch counts, wanted one at least: its weights are 0, or its labels −100")
    return measure.profile(tally)


_FIRST_DRAWS = 8
"""How many draws of a batch, at least, say how many more are needed for a relative error."""


class Draws(NamedTuple):
    """What the draws of a batch say, (draws, layers), as `Sizes` say of one draw."""

    value: Float[np.ndarray, "k l"]
    simplified: Float[np.ndarray, "k l"]
    trace: Float[np.ndarray, "k l"]

    @classmethod
    def of(cls, drawn: Sequence[Sizes]) -> "Draws":
        """Joins the layers of all stacks."""
        return cls(*(np.concatenate(each, axis=1, dtype=float) for each in zip(*jax.device_get(drawn), strict=True)))

    def __add__(self, more: Any) -> "Draws":
        return Draws(*(np.concatenate(both) for both in zip(self, more, strict=True)))


class _Measure:
    """The layers that are measured, with what is made once for all batches."""

    def __init__(
        self,
        outputs_fn: Callable[..., Any],
        params: Tree,
        batch: tuple[Any, ...],
        layers: Sequence[str | Layer] | None,
        loss: Loss,
        key: Key[Array, ""],
    ):
        self.outputs_fn, self.params, self.loss, self.key = outputs_fn, params, loss, key
        program = Program.of(sum_of(outputs_fn), params, batch)
        named = named_layers(program, params, layers)
        self.paths = paths_of(params, named)
        read, self.unread = read_layers(program, named)
        self.layers, self.num_calls = tuple(read), 0
        self.grams = _grams(params, layers=self.layers)

    def draws(self, batch: tuple[Any, ...], number: int) -> tuple[float, Draws]:
        """Draws of a batch, (draws, layers), and the sum of its weights."""
        keys = jax.random.split(jax.random.fold_in(self.key, self.num_calls), number)
        self.num_calls += 1
        size, drawn = draws_of_batch(
            self.outputs_fn, self.params, batch, keys, self.grams, layers=self.layers, loss=self.loss
        )
        return float(size), Draws.of(drawn)

    def profile(self, tally: "Tally") -> GaussNewtonProfile:
        """Makes the profile in the order of the paths, one layer of a stack after another."""
        leaves, estimates = leaves_by_path(self.params), iter(tally.estimates())
        names = {layer.path: layer.names(jnp.shape(leaves[layer.path])) for layer in self.layers}
        by_name = {name: next(estimates) for layer in self.layers for name in names[layer.path]}
        nan, none = jnp.asarray(jnp.nan), jnp.asarray(0, jnp.int32)
        unmeasured = GaussNewtonFlatness(nan, nan, nan, nan, nan, none)
        ordered = [name for path in self.paths for name in names.get(path, [path])]
        return GaussNewtonProfile([(name, by_name.get(name, unmeasured)) for name in ordered], self.unread)


class Tally:
    """What is known of all layers: of each batch its size, and its draws."""

    def __init__(self) -> None:
        self.batches: list[tuple[float, Draws]] = []

    def add(self, size: float, draws: Draws) -> None:
        """Adds a batch of so many samples."""
        self.batches.append((size, draws))

    def estimates(self) -> list[GaussNewtonFlatness]:
        """The mean over all samples so far, of each layer."""
        shares = np.array([size for size, _ in self.batches])[:, None] / sum(size for size, _ in self.batches)
        draws = [draws for _, draws in self.batches]
        means = np.stack([np.mean(each, axis=1) for each in draws])
        values = np.sum(shares[:, None] * means, axis=0)
        of_draws = np.stack([each.value.var(axis=0, ddof=1) / len(each.value) for each in draws])
        # Unbiased where the variance of a batch is as one over its size, as that of a mean of its samples.
        spare = np.where(shares < 1, 1 - shares, np.nan)
        errors = np.sqrt(np.sum(shares**2 * (means[:, 0] - values[0]) ** 2 / spare, axis=0))
        columns = np.stack([values[0], np.sqrt(np.sum(shares**2 * of_draws, axis=0)), errors, *values[1:]])
        num_draws = jnp.asarray(sum(len(each.value) for each in draws), jnp.int32)
        return [GaussNewtonFlatness(*map(jnp.asarray, of_layer), num_draws=num_draws) for of_layer in columns.T]


def _needed(values: Float[np.ndarray, "k l"], error: float) -> int:
    """How many draws bring every layer to a relative error, going by these; those of κ^GN = 0 need none."""
    means = values.mean(axis=0)
    ratios = values.var(axis=0, ddof=1) / np.where(means > 0, means, np.inf) ** 2
    return math.ceil(np.max(np.nan_to_num(ratios)) / error**2)


@functools.partial(jax.jit, static_argnames="layers")
def _grams(params: Tree, *, layers: tuple[Layer, ...]) -> dict[str, Float[Array, "l d d"]]:
    leaves = leaves_by_path(params)
    grams = {layer.path: gram_of(layer, leaves[layer.path]) for layer in layers}
    return {path: gram for path, gram in grams.items() if gram is not None}


@functools.partial(jax.jit, static_argnames=("outputs_fn", "layers", "loss"))
def draws_of_batch(
    outputs_fn: Callable[..., Any],
    params: Tree,
    batch: tuple[Any, ...],
    keys: Key[Array, " k"],
    grams: Mapping[str, Float[Array, "l d d"]],
    *,
    layers: tuple[Layer, ...],
    loss: Loss,
) -> tuple[Float[Array, ""], list[Sizes]]:
    """The sum of the weights, and the draws of each layer, (draws, layers of a stack)."""
    pulled = Pulled(outputs_fn, params, batch, layers, loss)

    def one(key: Key[Array, ""]) -> list[Sizes]:
        gradients = pulled.gradients(key)
        return [pulled.sizes(layer, gradients[layer.path], grams.get(layer.path)) for layer in layers]

    return pulled.total_weight, jax.lax.map(one, keys)
