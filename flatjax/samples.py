"""Labelled samples: any leading shape flattened, weights as shares, bad values marked.

A sample of weight 0, or of label −100 where labels are classes, is padding: whatever it holds, NaN included, counts
nowhere. If such a sample holds good values, one can ask how a mean would change with its weight. Nothing is sensitive
to any other padding. A bad value elsewhere (a label out of range, a negative weight) turns the share of its sample into
NaN, so that no mean over the samples can look plausible. Without `jax_enable_x64` JAX cuts what enters a `jax.jit` of
your own to 32 bits before it is seen here: a label 2³² is class 0 there, and bad elsewhere.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer, Shaped
from typing_extensions import TypeAliasType

from flatjax.core.dtypes import computing_dtype
from flatjax.heads import LinearHead

IGNORED_LABEL = -100
"""The label of padding, by the convention of those who pad tokens."""


# Named, so that a signature shows the name and not the union of all that it stands for; checked at run time as before.
Features = TypeAliasType("Features", Float[ArrayLike, "*n m"])
"""Features (..., m) of any floating dtype."""
Logits = TypeAliasType("Logits", Float[ArrayLike, "*n d"])
"""Logits (..., d) of any floating dtype."""
Classes = TypeAliasType("Classes", Integer[ArrayLike, "*n"])
"""One integer class a sample (...,)."""
Targets = TypeAliasType("Targets", Float[ArrayLike, "*n d"])
"""A target for each output of each sample (..., d)."""
Labels = TypeAliasType("Labels", Shaped[ArrayLike, "*n"] | Shaped[ArrayLike, "*n k"])
"""One label a sample (...,), or k of them (..., k); which are allowed, the loss says."""
Weights = TypeAliasType("Weights", Shaped[ArrayLike, "*n"])
"""One weight a sample (...,), real; a sample of weight 0 is padding."""
Scalar = TypeAliasType("Scalar", Float[ArrayLike, ""])
"""One number of a floating dtype."""


class Flaw(NamedTuple):
    """One way in which samples may be wrong, and which samples are."""

    bad: Bool[Array, " n"]
    message: str
    """The message, where `{i}` is the first bad sample's index in row-major order, and `{name}` its entry of a detail.
    """
    details: dict[str, Shaped[Array, " n"]]


class Samples(NamedTuple):
    """A number n of samples, flattened to one axis."""

    feats: Float[Array, "n m"]
    labels: Shaped[Array, " n"] | Shaped[Array, "n k"]
    weights: Float[Array, " n"]
    """The weights ω_i; that of a bad sample is NaN."""
    total_weight: Float[Array, ""]
    """The sum Σω, as if no sample were bad."""
    counts: Bool[Array, " n"]
    """Whether a sample counts: ω_i is not 0, and the label not −100. Elsewhere is padding."""
    flaws: tuple[Flaw, ...] = ()

    @property
    def shares(self) -> Float[Array, " n"]:
        """The share of each sample, ω_i / Σω."""
        return self.weights / self.total_weight

    def marked(self, bad: Bool[Array, "..."], message: str, **details: Shaped[Array, " n"]) -> "Samples":
        """Puts NaN in the weights of bad samples; padding is never bad, and nothing is sensitive to its weight."""
        samples = self.insensitive(bad & ~self.counts)
        bad = bad & self.counts
        flaws = (*self.flaws, Flaw(bad, message, details))
        return samples._replace(weights=jnp.where(bad, jnp.nan, samples.weights), flaws=flaws)

    def insensitive(self, padding: Bool[Array, " n"]) -> "Samples":
        """Removes the sensitivity to the weights of some of the padding, all of which are 0."""
        total_weight = self.total_weight - jnp.sum(jnp.where(padding, self.weights, 0))
        return self._replace(weights=jnp.where(padding, 0, self.weights), total_weight=total_weight)

    def mean(self, values: Float[Array, " n"]) -> Float[Array, ""]:
        """The weighted mean Σ_i e_i x_i; padding has no part in it, even if its x is infinite."""
        has_none = ~self.counts & ~jnp.isfinite(values)
        return jnp.sum(self.insensitive(has_none).shares * jnp.where(has_none, 0, values))


def flatten_samples(
    head: LinearHead,
    feats: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None,
    *,
    ignored_label: int | None = IGNORED_LABEL,
    unit: Float[Array, ""] | None = None,
) -> Samples:
    """Flattens the leading shape, and casts to the dtype to compute in.

    It computes in float64 if an input or the head has it, else in float32.

    Args:
        head: what the features enter.
        feats: features (..., m).
        labels: classes (...,), or targets (..., k).
        weights: ω (...,), all 1 if None.
        ignored_label: the class of padding; None if labels are no classes, as far as is known.
        unit: times which the features can be squared, 1 if None. If it is given, a good sample may have the weight 0
            and a derivative in it: such a sample keeps its own values, and all other padding gets those of one that
            counts.

    Raises:
        TypeError: `feats` is not of a floating dtype, or `weights` not of a real one.
        ValueError: the shapes of `feats`, `labels`, `weights` and the head do not fit each other.
    """
    feats, labels = jnp.asarray(feats), jnp.asarray(labels)
    num_features = head.num_features
    if not jnp.issubdtype(feats.dtype, jnp.floating):
        raise TypeError(f"feats has dtype {feats.dtype}, wanted a floating dtype")
    if feats.ndim < 1 or feats.shape[-1] != num_features:
        raise ValueError(
            f"feats has shape {feats.shape}, but the head takes {num_features} features: wanted (..., {num_features}); "
            "a kernel is (in, out), an embedding (out, in)"
        )
    leading = feats.shape[:-1]
    if 0 in leading:
        raise ValueError(f"feats has shape {feats.shape}, which holds no sample: wanted at least one")
    if labels.shape[: len(leading)] != leading or labels.ndim > len(leading) + 1:
        raise ValueError(
            f"labels has shape {labels.shape}, wanted {leading} or {(*leading, head.num_outputs)}, as feats has "
            f"{feats.shape}"
        )
    weights = jnp.ones(leading, feats.dtype) if weights is None else jnp.asarray(weights)
    if weights.shape != leading:
        raise ValueError(
            f"weights has shape {weights.shape}, wanted {leading}, one a sample, as feats has {feats.shape}"
        )
    if not any(jnp.issubdtype(weights.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"weights has dtype {weights.dtype}, wanted a real one")

    dtype = computing_dtype(head.matrix, head.bias, feats, labels, weights)
    n = feats.size // num_features
    feats, weights = feats.astype(dtype).reshape(n, num_features), weights.astype(dtype).reshape(n)
    labels = widened(labels).reshape(n, *labels.shape[len(leading) :])
    are_classes = ignored_label is not None and labels.ndim == 1 and jnp.issubdtype(labels.dtype, jnp.integer)
    is_ignored = labels == ignored_label if are_classes else jnp.zeros(n, bool)
    counts = (weights != 0) & ~is_ignored
    squares = jnp.sum((feats if unit is None else feats * unit.astype(dtype)) ** 2, axis=1)
    is_kept = counts
    if unit is not None:
        # Room for the squares of the rows too: what is finite has a derivative, and 0 times that is 0.
        is_small = squares < float(jnp.finfo(dtype).max) ** 0.5
        is_kept |= ~is_ignored & is_small & _seem_good(labels, counts, of_any_loss=ignored_label is None)
    is_first = counts & (jnp.arange(n) == jnp.argmax(counts))

    def without_padding(values: Shaped[Array, "n ..."]) -> Shaped[Array, "n ..."]:
        """Replaces padding by a copy of the first sample that counts, where a loss has a value if it has any."""
        column = (n, *[1] * (values.ndim - 1))
        # Summed, not sliced: of samples split among devices a slice is cut once all are gathered. Zero if none counts.
        first = jnp.sum(jnp.where(is_first.reshape(column), values, jnp.zeros_like(values)), axis=0)
        return jnp.where(is_kept.reshape(column), values, first.astype(values.dtype)[None])

    # To what was replaced nothing is sensitive, its weight included.
    weights = jnp.where(is_kept, weights, 0)
    samples = Samples(without_padding(feats), without_padding(labels), weights, jnp.sum(weights), counts)
    bad = (weights < 0) | ~jnp.isfinite(samples.total_weight)
    samples = samples.marked(bad, "weights[{i}] is {weight}; wanted 0 or more, and a finite sum", weight=weights)
    return samples.marked(
        ~jnp.isfinite(squares), "feats[{i}] holds a NaN, an infinity, or a number whose square is one"
    )


def _seem_good(labels: Shaped[Array, "n ..."], counts: Bool[Array, " n"], *, of_any_loss: bool) -> Bool[Array, " n"]:
    """Whether a loss may be asked for its value at the labels, those of padding among them."""
    values = labels.reshape(len(labels), -1)
    if not of_any_loss:
        # Whether a class is one of the head's is asked later.
        return jnp.isfinite(jnp.sum(jnp.abs(values), axis=1))
    # What is a label to a loss of which nothing is known are those that count, and what lies between them.
    values = values.astype(jnp.int32) if values.dtype == bool else values
    info = jnp.finfo(values.dtype) if jnp.issubdtype(values.dtype, jnp.floating) else jnp.iinfo(values.dtype)
    least = jnp.min(jnp.where(counts[:, None], values, info.max), axis=0)
    most = jnp.max(jnp.where(counts[:, None], values, info.min), axis=0)
    return jnp.all((values >= least[None]) & (values <= most[None]), axis=1)


def widened(labels: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Casts classes to a signed dtype, which holds the number of outputs too."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return labels
    return labels.astype(jnp.int64 if labels.dtype.itemsize == 8 else jnp.int32)


def check_one_class_a_sample(samples: Samples, labels: ArrayLike) -> None:
    """Raises a TypeError for `labels`, as they were given, that are no integers or more than one a sample."""
    if samples.labels.ndim != 1 or not jnp.issubdtype(samples.labels.dtype, jnp.integer):
        raise TypeError(
            f"labels has dtype {samples.labels.dtype} and shape {jnp.shape(labels)}, wanted one integer class a sample"
        )


def mark_class_labels(samples: Samples, num_classes: int) -> Samples:
    """Marks integer labels that are not in 0 … `num_classes` − 1."""
    labels = samples.labels
    message = f"labels[{{i}}] is {{label}}; wanted 0 <= label < {num_classes}, or {IGNORED_LABEL} or weight 0"
    return samples.marked((labels < 0) | (labels >= num_classes), message, label=labels)
