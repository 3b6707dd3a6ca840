"""The geometry of features of mixed inputs: along a classifier's row, or in the span of two."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped

from flatjax.collapse.nc2_geometry import row_norms
from flatjax.core import results
from flatjax.core.metric import metric
from flatjax.heads import HeadParams, linear_head
from flatjax.samples import Classes, Features, Weights, check_one_class_a_sample, flatten_samples, mark_class_labels


class MixupGeometry(NamedTuple):
    """The result of `mixup_geometry`: under mixup training the first value rises to 1, and the second falls to 0.

    The values are scalars, or under `vmap` one for each of the batch.

    Attributes:
        same_class_cosine: mean over classes c of cos(h̄_cc, w_c).
        cross_class_residual: mean over unordered pairs i ≠ j of ‖h̄_ij − P h̄_ij‖/‖h̄_ij‖, P the projection onto
            span{w_i, w_j}.
        num_classes: classes in the first mean.
        num_pairs: pairs in the second.
        num_parallel: pairs of these whose two rows are parallel, or one of them 0: P is onto what they span.
        num_undefined: classes and pairs with mixes that are in neither mean, as h̄ is 0, or w_c is.
    """

    same_class_cosine: Float[Array, ""]
    cross_class_residual: Float[Array, ""]
    num_classes: Int[Array, ""]
    num_pairs: Int[Array, ""]
    num_parallel: Int[Array, ""]
    num_undefined: Int[Array, ""]

    to_dict = results.to_dict
    __str__ = results.to_table


@metric
def mixup_geometry(
    params: HeadParams,
    feats: Features,
    labels: Classes,
    partners: Classes,
    weights: Weights | None = None,
    *,
    centred: bool = False,
) -> MixupGeometry:
    """Measures how the mean features h̄_ij of mixes of classes i and j lie to the classifier's rows.

    Networks that are trained on mixes tx + (1 − t)x' of inputs and of their targets come to h̄_cc along w_c, whatever t,
    and to h̄_ij in span{w_i, w_j}. Each mean is over all mixes of the two classes that are given, in either order. For a
    curve in t, measure the mixes of one t at a time. All means weigh the same in the result, however many mixes they
    are of.

    Args:
        params: the head of C outputs, as for `relative_flatness`. The bias plays no part.
        feats: features of the mixes (..., m), which `mixup` makes of inputs.
        labels: the class of the one input of each mix (...,).
        partners: the class of the other (...,).
        weights: sample weights (...,), all 1 by default; 0 masks a mix, as a label of −100 does, and the derivative in
            that weight is 0.
        centred: whether to take the mean of the h̄_cc from all features, and the mean row from all rows. The theory has
            no use for it, as there both are 0; features after a ReLU are in one orthant. Static.

    Returns:
        A `MixupGeometry`: the two means and what is in them. A mean of nothing is NaN. All is NaN where a feature or
        the head is not finite, a class out of range or a weight negative.

    Raises:
        TypeError: `params` is no mapping, or the classes are not integers.
        ValueError: shapes that do not fit.

    Notes:
        The memory is that of a few (n, m) arrays, however many pairs there are.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import mixup_geometry
        >>> head = {"kernel": jnp.eye(3)}
        >>> feats = jnp.array([[2.0, 0.0, 0.0], [4.0, 3.0, 0.0], [0.0, 0.3, 0.4]])
        >>> geometry = mixup_geometry(head, feats, jnp.array([0, 0, 1]), jnp.array([0, 1, 0]))
        >>> print(f"{geometry.same_class_cosine:.4f} {geometry.cross_class_residual:.4f} {geometry.num_pairs}")
        1.0000 0.0769 1

    References:
        Fisher, Meng, Papyan: *Pushing Boundaries: Mixup's Influence on Neural Collapse*, ICLR 2024.
    """
    head = linear_head(params)
    samples = flatten_samples(head, feats, labels, weights)
    check_one_class_a_sample(samples, labels)
    partners = jnp.asarray(partners)
    if partners.shape != jnp.shape(labels):
        raise ValueError(f"partners has shape {partners.shape}, wanted {jnp.shape(labels)}, one class a mix, as labels")
    if not jnp.issubdtype(partners.dtype, jnp.integer):
        raise TypeError(f"partners has dtype {partners.dtype}, wanted integer classes")
    samples = mark_class_labels(samples, head.num_outputs)
    partners = jnp.where(samples.counts, partners.reshape(-1).astype(samples.labels.dtype), samples.labels)
    message = f"partners[{{i}}] is {{partner}}; wanted 0 <= partner < {head.num_outputs}"
    samples = samples.marked((partners < 0) | (partners >= head.num_outputs), message, partner=partners)

    rows = head.weight.astype(samples.feats.dtype)
    groups = _grouped(samples.feats, samples.weights, samples.labels, partners)
    is_class = groups.first == groups.second
    means = groups.means
    if centred:
        rows = rows - jnp.mean(rows, axis=0, keepdims=True)
        shift = _mean(means, groups.present & is_class)
        means = jnp.where(groups.present[:, None], means - shift[None, :], 0)

    rows, directions = _units(rows), _units(means)
    first, second = rows[groups.first], rows[groups.second]
    # What the second adds to the span, of length 1 if it does: twice, as rounding leaves some of the first.
    added = _without(first, _without(first, second))
    in_line = (row_norms(added) < _PARALLEL * jnp.finfo(rows.dtype).eps) | ~jnp.any(first != 0, axis=1)
    in_line |= ~jnp.any(second != 0, axis=1)
    # If the first row is 0, the second alone is what was added.
    added = jnp.where((in_line & jnp.any(first != 0, axis=1))[:, None], 0, _units(added))
    outside = directions
    for _ in range(2):
        outside = _without(added, _without(first, outside))

    has_direction = groups.present & jnp.any(means != 0, axis=1)
    in_classes = has_direction & is_class & jnp.any(first != 0, axis=1)
    in_pairs = has_direction & ~is_class
    diverged = ~head.is_finite | jnp.isnan(samples.total_weight) | jnp.any(jnp.isnan(samples.weights))
    cosine = _mean(jnp.sum(directions * first, axis=1), in_classes)
    residual = _mean(row_norms(outside), in_pairs)
    return MixupGeometry(
        same_class_cosine=jnp.where(diverged, jnp.nan, cosine),
        cross_class_residual=jnp.where(diverged, jnp.nan, residual),
        num_classes=jnp.sum(in_classes),
        num_pairs=jnp.sum(in_pairs),
        num_parallel=jnp.sum(in_pairs & in_line),
        num_undefined=jnp.sum(groups.present & ~in_classes & ~in_pairs),
    )


@metric
def mixup(
    key: Key[Array, ""], inputs: Shaped[ArrayLike, "n ..."], labels: Integer[ArrayLike, " n"], mixing_weight: ArrayLike
) -> tuple[Float[Array, "n ..."], Integer[Array, " n"], Integer[Array, " n"]]:
    """Mixes each input with another, tx + (1 − t)x', at random, and gives the classes of the two.

    Args:
        key: the random key for the order of the others.
        inputs: x (n, ...).
        labels: classes (n,).
        mixing_weight: t, one or (n,).

    Returns:
        The mixes, the classes of x, and those of x': what `mixup_geometry` takes, once a network has made features of
        the first.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.collapse import mixup
        >>> mixes, labels, partners = mixup(jax.random.key(0), jnp.array([[0.0], [8.0]]), jnp.array([3, 5]), 0.75)
        >>> mixes.shape, labels.tolist(), sorted(partners.tolist())
        ((2, 1), [3, 5], [3, 5])

    References:
        Zhang, Cissé, Dauphin, Lopez-Paz: *mixup: Beyond Empirical Risk Minimization*, ICLR 2018.
    """
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels)
    dtype = inputs.dtype if jnp.issubdtype(inputs.dtype, jnp.floating) else jnp.float32
    inputs, t = inputs.astype(dtype), jnp.asarray(mixing_weight, dtype)
    t = t.reshape(t.shape + (1,) * (inputs.ndim - t.ndim)) if t.ndim else t
    order = jax.random.permutation(key, len(labels))
    return t * inputs + (1 - t) * inputs[order], labels, labels[order]


_PARALLEL = 16
"""How many roundings the sine of an angle may be for rows to be parallel."""


class _Groups(NamedTuple):
    """Groups of mixes of the same two classes, at most one group a mix; the others are not present."""

    present: Bool[Array, " n"]
    first: Integer[Array, " n"]
    second: Integer[Array, " n"]
    means: Float[Array, "n m"]


def _grouped(
    feats: Float[Array, "n m"],
    weights: Float[Array, " n"],
    labels: Integer[Array, " n"],
    partners: Integer[Array, " n"],
) -> _Groups:
    n = len(labels)
    lower, higher = jnp.minimum(labels, partners), jnp.maximum(labels, partners)
    order = jnp.lexsort((higher, lower))
    lower, higher, weights = lower[order], higher[order], weights[order]
    is_new = (lower[1:] != lower[:-1]) | (higher[1:] != higher[:-1])
    group = jnp.cumsum(jnp.concatenate([jnp.zeros(1, labels.dtype), is_new.astype(labels.dtype)]))

    def per_group(values: Array) -> Array:
        return jax.ops.segment_sum(values, group, n)

    masses = per_group(weights)
    means = per_group(weights[:, None] * feats[order]) / jnp.where(masses == 0, 1, masses)[:, None]
    start = jnp.searchsorted(group, jnp.arange(n, dtype=group.dtype)).clip(max=n - 1)
    return _Groups(masses != 0, lower[start], higher[start], means)


def _mean(values: Float[Array, "n ..."], chosen: Bool[Array, " n"]) -> Float[Array, "..."]:
    """The mean of the chosen values; NaN if none is chosen."""
    mask = chosen.reshape(-1, *[1] * (values.ndim - 1))
    return jnp.sum(jnp.where(mask, values, 0), axis=0) / jnp.sum(chosen).astype(values.dtype)


def _without(directions: Float[Array, "n m"], rows: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """Removes from rows what they have along unit directions."""
    return rows - jnp.sum(directions * rows, axis=1, keepdims=True) * directions


def _units(rows: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """The directions of rows, 0 for 0. No square of a large or small number overflows or underflows."""
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1, keepdims=True))
    rows = rows / jnp.where(size == 0, 1, size)
    norms = row_norms(rows)
    return rows / jnp.where(norms == 0, 1, norms)[:, None]
