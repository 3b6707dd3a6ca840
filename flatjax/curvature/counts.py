"""Count the samples of a batch that count: its mean is weighed by them among those of other batches or devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from flatjax.core.arrays import holds_keys
from flatjax.core.dtypes import computing_dtype
from flatjax.core.metric import metric
from flatjax.samples import IGNORED_LABEL, widened


def num_samples(batch: Any, count: Callable[..., Any] | None = None) -> float:
    """Counts the samples of a batch that count: `count(*batch)`, or what the batch itself shows.

    A loss is the mean of what counts. The mean of such means is that of all samples if each is weighed by its number.
    The number is read off the arrays of a batch, in their order, from their dtypes and shapes. Keys of random numbers,
    raw ones (uint32 of the shape of a key) too, are passed over:

    1. The last array of integers is taken for the labels. As many samples count as it has entries that are not −100.
    2. The first array after it that is floating or boolean, and of exactly the shape of the labels, is taken for sample
       weights. Then the sum of those weights counts whose labels are not −100.
    3. Without integers it is the length of the first array.

    So each token counts, and for images each label. A mask of integers, or one that comes before the labels, is not
    seen, and weights of another shape are not either: give a `count`.

    Args:
        batch: a tuple of arrays, or any tree; a dictionary is read in the order of its sorted keys.
        count: `(*batch) -> number`, instead.

    Raises:
        ValueError: there is no array with an axis of samples in the batch.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.curvature import num_samples
        >>> x, labels, weights = jnp.ones((4, 3)), jnp.array([2, 0, -100, 1]), jnp.array([1.0, 0.5, 1.0, 0.0])
        >>> num_samples((x, labels)), num_samples((x, labels, weights)), num_samples((jax.random.PRNGKey(0), x))
        (3.0, 1.5, 4.0)
    """
    return float(counted(batch, count))


def counted(batch: Any, count: Callable[..., Any] | None = None) -> Any:
    """The number that `num_samples` gives, which may be traced here."""
    if count is not None:
        return count(*batch)
    arrays = _arrays(batch)
    if not arrays:
        raise ValueError(
            "a batch holds no array with an axis of samples: give a count, the function of a batch that says how many "
            "of its samples count"
        )
    found = _labels_and_weights(arrays)
    return _total(*found) if found else float(jnp.shape(arrays[0])[0])


def sample_weights(batch: Any, shape: tuple[int, ...]) -> Array | None:
    """The weights of samples of a shape that a batch shows, by the rule of `num_samples`; None if it shows none."""
    found = _labels_and_weights(_arrays(batch))
    return _weights(*found) if found and jnp.shape(found[0]) == shape else None


def _arrays(batch: Any) -> list[Any]:
    """The arrays of a batch that may be of samples: no single numbers, and no keys."""
    return [leaf for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf) and not holds_keys(leaf)]


def _labels_and_weights(arrays: list[Any]) -> list[Any]:
    """The labels of a batch, and the weights after them if there are any; nothing if there are no labels."""
    places = [place for place, leaf in enumerate(arrays) if jnp.issubdtype(_dtype(leaf), jnp.integer)]
    if not places:
        return []
    labels = arrays[places[-1]]
    same_shape = [leaf for leaf in arrays[places[-1] + 1 :] if jnp.shape(leaf) == jnp.shape(labels)]
    return [labels, *same_shape[:1]]


@jax.jit
@metric
def _total(labels: Shaped[ArrayLike, "..."], weights: Shaped[ArrayLike, "..."] | None = None) -> Float[Array, ""]:
    if weights is None:  # counted as integers: a sum of ones in float32 may stop at 2²⁴
        return jnp.sum(widened(jnp.asarray(labels)) != IGNORED_LABEL, dtype=jnp.int32).astype(jnp.float32)
    return jnp.sum(_weights(labels, weights))


def _weights(labels: Shaped[ArrayLike, "..."], weights: Shaped[ArrayLike, "..."] | None = None) -> Float[Array, "..."]:
    counts = widened(jnp.asarray(labels)) != IGNORED_LABEL
    if weights is None:
        return counts.astype(jnp.float32)
    weights = jnp.asarray(weights)
    return jnp.where(counts, weights.astype(computing_dtype(weights)), 0)


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
