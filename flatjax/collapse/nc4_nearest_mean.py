"""Measure whether the network decides as the nearest class mean does (NC4)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Shaped

from flatjax.collapse.class_means import ClassMeans, class_means, classifier
from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.pairs import tile_of
from flatjax.core import results
from flatjax.core.distances import FEW, squared_distances, squared_distances_between
from flatjax.core.metric import metric
from flatjax.core.sharding import varying_like
from flatjax.heads import HeadParams, LinearHead


class Decisions(NamedTuple):
    """Sums of weights; for two batches together add both: `jax.tree.map(operator.add, ...)`."""

    disagreeing: Float[Array, ""]
    """The weight of samples for which network and nearest class mean are of different classes."""
    total: Float[Array, ""]
    """The weight of all samples whose class is kept."""

    to_dict = results.to_dict
    __str__ = results.to_table

    @property
    def share(self) -> Float[Array, ""]:
        """The share NC4 of samples that disagree, from 0, collapsed, to 1."""
        return self.disagreeing / self.total

    @property
    def standard_error(self) -> Float[Array, ""]:
        """The standard error √(p(1 − p)/Σω), for samples of weight 1 that are drawn at random."""
        return jnp.sqrt(self.share * (1 - self.share) / self.total)


@metric
def nc4(
    moments: ClassMoments,
    params: HeadParams,
    feats: Float[Any, "*n m"],
    labels: Integer[Any, "*n"],
    weights: Shaped[Any, "*n"] | None = None,
    *,
    bias: bool = True,
    min_count: int = 2,
    tile_size: int | None = None,
) -> Decisions:
    """NC4: the share of samples for which the largest logit and the nearest class mean are of different classes.

    For a stream, take each batch on its own, and add the sums of all.

    Args:
        moments: of C classes and m features.
        params: the head of C outputs, as for `relative_flatness`.
        feats: features (..., m), as for `ClassMoments.update`, of the samples of the moments or of others.
        labels: classes (...,). They decide which samples count, and what these are measured from, and nothing else.
        weights: sample weights (...,), all 1 by default; 0 masks a sample, and the derivative in that weight is 0.
        bias: whether the network decides with its bias.
        min_count: classes with fewer samples are left out: no sample is near to their means, and theirs do not count.
        tile_size: t, how many classes are compared at a time.

    Returns:
        `Decisions`, whose `share` is NC4. It is NaN if fewer than two classes are left or all means are one, and where
        a sample or the head is bad, or a logit infinite. If several means are equally near, the first counts.

    Raises:
        TypeError, ValueError: as `equinorm` and `ClassMoments.update`.

    Notes:
        For n samples the cost is a product of matrices (n, m)·(m, C) for the logits and two for the means. The memory
        is O((n + t)·m + n·t).

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.collapse import ClassMoments, nc4
        >>> feats, labels = jnp.array([[1.0], [0.8], [-1.0], [0.1]], jnp.float32), jnp.array([0, 0, 1, 1])
        >>> moments = ClassMoments.init(2, 1).update(feats, labels)
        >>> params = {"kernel": jnp.array([[1.0, -1.0]]), "bias": jnp.array([0.0, 1.0])}
        >>> print(nc4(moments, params, feats, labels).share, nc4(moments, params, feats, labels, bias=False).share)
        0.0 0.25

    References:
        Papyan, Han, Donoho: *Prevalence of Neural Collapse during the Terminal Phase of Deep Learning Training*, 2020.
    """
    classes, head = class_means(moments, min_count=min_count), classifier(params, moments)
    batch = moments.read(feats, labels, weights)
    residuals = moments.residuals(batch) / classes.unit
    shown = head if bias else LinearHead(head.matrix, jnp.zeros_like(head.bias), head.rows_axis)
    disagrees = disagreements(shown, batch.feats, residuals, batch.classes, classes, tile_size)
    weights = jnp.where(classes.kept[batch.classes], batch.weights, 0)
    sums = Decisions(jnp.sum(jnp.where(weights == 0, 0, weights * disagrees)), jnp.sum(weights))
    return Decisions(*(jnp.where(batch.num_bad > 0, jnp.nan, classes.defined(x, head)) for x in sums))


def disagreements(
    head: LinearHead,
    feats: Float[Array, "n m"],
    residuals: Float[Array, "n m"],
    labels: Integer[Array, " n"],
    classes: ClassMeans,
    tile_size: int | None = None,
) -> Float[Array, " n"]:
    """1 for a sample whose nearest kept mean and largest logit are of two classes, else 0.

    `residuals` are from its own mean.

    It is NaN where no logit is known to be the largest, as one is infinite or NaN, or where all means are one.
    """
    head, feats, residuals = jax.lax.stop_gradient((head, feats, residuals))
    rows, num_classes = jax.lax.stop_gradient(classes.placed), len(classes.placed)
    tile_size = tile_of(tile_size, num_classes)
    own_means = rows[labels]
    table = squared_distances(rows) if num_classes <= FEW else None
    own_alignments = jnp.sum(residuals * own_means, axis=1)[:, None]

    def step(best: Any, i: Array) -> tuple[Any, None]:
        # A last tile begins early, to be as large as the others; of two equals the first is taken.
        start = jnp.minimum(i * tile_size, num_classes - tile_size)
        means, kept = (jax.lax.dynamic_slice_in_dim(x, start, tile_size) for x in (rows, classes.kept))
        matrix = jax.lax.dynamic_slice_in_dim(head.matrix, start, tile_size, head.rows_axis)
        bias = jax.lax.dynamic_slice_in_dim(head.bias, start, tile_size)
        outputs = start + jnp.arange(tile_size, dtype=start.dtype)

        # ‖h − μ_y‖² − ‖h − μ_c‖² with y the sample's own class: a difference of neighbours, not of what they share.
        others = kept[None, :] & (outputs[None, :] != labels[:, None].astype(outputs.dtype))
        if table is None:
            distances = squared_distances_between(own_means, means, others)
        else:
            distances = jax.lax.dynamic_slice_in_dim(table, start, tile_size, axis=1)[labels]
        closeness = 2 * (residuals @ means.T - own_alignments) - distances
        closeness = jnp.where(others, closeness, jnp.where(kept[None, :], 0, -jnp.inf))
        logits = LinearHead(matrix, bias, head.rows_axis).logits(feats)
        return tuple(_better(x, outputs, one) for x, one in zip((closeness, logits), best, strict=True)), None

    nothing = jnp.full(len(feats), -jnp.inf, feats.dtype), jnp.zeros(len(feats), jnp.int32)
    nothing = varying_like(nothing, (head, feats, residuals, rows))
    (nearest, decided), _ = jax.lax.scan(
        step, (nothing, nothing), jnp.arange(-(-num_classes // tile_size), dtype=jnp.int32)
    )
    known = jnp.isfinite(decided[0]) & jnp.any(rows != 0)
    return jnp.where(known, (nearest[1] != decided[1]).astype(feats.dtype), jnp.nan)


def _better(values: Float[Array, "n t"], outputs: Integer[Array, " t"], best: tuple[Array, Array]) -> Any:
    place, value = jnp.argmax(values, axis=1), jnp.max(values, axis=1)
    return jnp.maximum(value, best[0]), jnp.where(value > best[0], outputs[place], best[1])
