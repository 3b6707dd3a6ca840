"""Depth-wise collapse: the moments of the classes in every layer's features at once, from one stream of batches."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Integer, Shaped

from flatjax.collapse.moments import ClassMoments
from flatjax.collapse.report import CollapseReport, collapse_report
from flatjax.heads import HeadParams

LayerMoments = dict[str, ClassMoments]
"""Moments by the name of the layer: a tree of arrays, as moments are, to be jitted and checkpointed as one.

What leaves a compiled function is in the order of the names, not of the layers.
"""


def init_layers(
    feats: Mapping[str, Any],
    labels: Any,
    *,
    num_classes: int,
    covariance_up_to: int = 0,
    dtype: DTypeLike = jnp.float32,
) -> LayerMoments:
    """Moments of no samples yet for each layer, to `update_layers` with batches.

    The features that a layer has of a sample, whatever their shape, are one vector: all axes that the labels do not
    have are flattened. Pool a convolution's features first, unless each position's are to be features of their own.

    Args:
        feats: features of a batch (..., *) by the name of the layer, or their shapes, as `jax.eval_shape` gives them.
        labels: the labels of that batch (...,), or their shape.
        num_classes: C, the number of classes.
        covariance_up_to: layers of at most so many features keep their covariance, which NC1 needs: (m, m) numbers.
        dtype: as for `ClassMoments.init`.

    Raises:
        ValueError: features that do not begin with the shape of the labels.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.collapse import init_layers, layer_reports, update_layers
        >>> feats = {"first": jnp.ones((4, 2, 3), jnp.float32), "last": jnp.array([[1.0], [3], [7], [9]], jnp.float32)}
        >>> labels = jnp.array([0, 0, 1, 1])
        >>> moments = init_layers(feats, labels, num_classes=2)
        >>> moments = jax.jit(update_layers, donate_argnums=0)(moments, feats, labels)
        >>> {name: each.num_features for name, each in moments.items()}
        {'first': 6, 'last': 1}
        >>> print(f"{layer_reports(moments)['last'].cdnv:.4f}")
        0.0278
    """
    leading = tuple(labels.shape)
    moments = {}
    for name, value in feats.items():
        width = math.prod(_own_shape(name, value, leading))
        moments[name] = ClassMoments.init(num_classes, width, covariance=width <= covariance_up_to, dtype=dtype)
    return moments


def update_layers(
    moments: LayerMoments,
    feats: Mapping[str, Any],
    labels: Integer[Any, "*n"],
    weights: Shaped[Any, "*n"] | None = None,
) -> LayerMoments:
    """Updates the moments of every layer with one more batch, as `ClassMoments.update` does.

    Raises:
        ValueError: other layers than the moments are of, or shapes that do not fit.
        TypeError: as `ClassMoments.update`.
    """
    if moments.keys() != feats.keys():
        raise ValueError(f"feats are of the layers {sorted(feats)}, but the moments of {sorted(moments)}")
    leading = tuple(labels.shape)
    updated = {}
    for name, value in feats.items():
        width = math.prod(_own_shape(name, value, leading))
        updated[name] = moments[name].update(value.reshape(*leading, width), labels, weights)
    return updated


def layer_reports(
    moments: LayerMoments, heads: Mapping[str, HeadParams] | None = None, *, min_count: int = 2
) -> dict[str, CollapseReport]:
    """Makes the `collapse_report` of every layer, with the classifier of those layers that `heads` has one for.

    Raises:
        ValueError: a head for a layer that there are no moments of, or that does not fit its features.
    """
    heads = heads or {}
    if unknown := heads.keys() - moments.keys():
        raise ValueError(f"heads are of the layers {sorted(unknown)}, but the moments of {sorted(moments)}")
    return {name: collapse_report(each, heads.get(name), min_count=min_count) for name, each in moments.items()}


def _own_shape(name: str, value: Any, leading: tuple[int, ...]) -> tuple[int, ...]:
    shape = tuple(value.shape)
    if shape[: len(leading)] != leading or len(shape) == len(leading):
        raise ValueError(
            f"features of {name!r} have shape {shape}, wanted {(*leading, '...')}, as labels have {leading}"
        )
    return shape[len(leading) :]
