"""A batch of labelled features, checked and flattened."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from flatjax.samples import IGNORED_LABEL, widened


class Batch(NamedTuple):
    """A number n of samples, flattened, in a dtype to compute in."""

    feats: Float[Array, "n m"]
    """The features, 0 where a sample is padding, or bad."""
    labels: Integer[Array, " n"]
    """The labels, C where a sample is padding, or bad."""
    weights: Float[Array, " n"]
    """The weights, 0 where a sample is padding, or bad."""
    classes: Integer[Array, " n"]
    """The classes to look up, 0 where a sample is padding, or bad."""
    num_bad: Int[Array, ""]


def read_batch(
    feats: Any, labels: Any, weights: Any, *, num_classes: int, num_features: int, dtype: jnp.dtype
) -> Batch:
    """Checks a batch against the moments that it is for; raises as `ClassMoments.update`."""
    feats, labels = jnp.asarray(feats), jnp.asarray(labels)
    if not jnp.issubdtype(feats.dtype, jnp.floating):
        raise TypeError(f"feats has dtype {feats.dtype}, wanted a floating dtype")
    if feats.dtype.itemsize > dtype.itemsize:
        raise TypeError(
            f"feats has dtype {feats.dtype}, but the moments are {dtype}: cast the features, or "
            f"ClassMoments.init(..., dtype={feats.dtype})"
        )
    if feats.ndim < 1 or feats.shape[-1] != num_features:
        raise ValueError(f"feats has shape {feats.shape}, but the moments are of {num_features} features")
    leading = feats.shape[:-1]
    if labels.shape != leading or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise (ValueError if labels.shape != leading else TypeError)(
            f"labels has dtype {labels.dtype} and shape {labels.shape}, wanted integers of shape {leading}, as feats "
            f"has {feats.shape}"
        )
    weights = jnp.ones(leading, dtype) if weights is None else jnp.asarray(weights).astype(dtype)
    if weights.shape != leading:
        raise ValueError(f"weights has shape {weights.shape}, wanted {leading}, as feats has {feats.shape}")

    feats, labels, weights = feats.astype(dtype).reshape(-1, num_features), labels.reshape(-1), weights.reshape(-1)
    labels = widened(labels)
    counts = (weights != 0) & (labels != IGNORED_LABEL)
    sound = (labels >= 0) & (labels < num_classes) & (weights > 0) & jnp.isfinite(weights)
    sound &= jnp.isfinite(jnp.sum(feats**2, axis=1))
    taken = counts & sound
    return Batch(
        feats=jnp.where(taken[:, None], feats, 0),
        labels=jnp.where(taken, labels.astype(jnp.int32), num_classes),
        weights=jnp.where(taken, weights, 0),
        classes=jnp.where(taken, labels.astype(jnp.int32), 0),
        num_bad=jnp.sum(counts & ~sound, dtype=jnp.int32),
    )
