"""The curvature of a data set, batch by batch."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flatjax.curvature.leaves import Tree
from flatjax.curvature.products import Curvature, given, itself


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The curvature of a data set's loss, from that of its batches: Σ_b n_b C_b / Σ_b n_b, exactly.

    Args:
        of_batch: `(*batch) -> Curvature`, as `lambda x, y: Hessian(loss_fn, params, (x, y))`. Let `loss_fn` be one
            function for all batches, or each is compiled anew.
        batches: tuples of arrays; they are gone through once for each call of `products`, so no iterator that is used
            up by then: a list, a loader.
        count: `(*batch) -> n_b`, by default the length of the batch's first array. Where the loss leaves samples out,
            that of those which count.

    Raises:
        TypeError: `batches` is an iterator.
        ValueError: there is no batch, or a batch of no samples alone.
    """

    of_batch: Callable[..., Curvature]
    batches: Iterable[tuple[Any, ...]]
    count: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check_batches(self.batches)

    @property
    def like(self) -> Tree:
        for batch in self.batches:
            return self.of_batch(*batch).like
        raise ValueError("batches is empty, wanted at least one batch")

    def products(self, vectors: Tree, *, chunk_size: int = 1) -> Tree:
        return self.forms(given, itself, vectors, chunk_size=chunk_size)

    def forms(
        self,
        draw: Callable[[Tree, Any], Tree],
        form: Callable[[Tree, Tree], Tree],
        keys: Any,
        *,
        chunk_size: int = 1,
    ) -> Tree:
        total, total_count = None, 0.0
        for batch in self.batches:
            count = num_samples(batch, self.count)
            forms = self.of_batch(*batch).forms(draw, form, keys, chunk_size=chunk_size)
            total = _scaled(count, forms) if total is None else _plus_scaled(total, count, forms)
            total_count += count
        if total is None:
            raise ValueError("batches is empty, wanted at least one batch")
        if total_count == 0:
            raise ValueError("batches holds no samples that count, wanted at least one")
        return _scaled(1 / total_count, total)

    def loop(self, step: Callable[[Callable[[Tree], Tree], Any, Any], Any], state: Any, xs: Any) -> Any:
        def products(vectors: Tree) -> Tree:
            return self.products(vectors, chunk_size=len(jax.tree.leaves(vectors)[0]))

        for i in range(len(jax.tree.leaves(xs)[0])):
            state = step(products, state, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
        return state


def check_batches(batches: Iterable[tuple[Any, ...]]) -> None:
    """Raises a TypeError for an iterator, of which the second reading would find nothing."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is an iterator ({type(batches).__name__}), which is used up once it was gone through: "
            "wanted a list or a loader that can be gone through again"
        )


def num_samples(batch: Sequence[Any], count: Callable[..., Any] | None = None) -> float:
    """That a batch's loss is the mean of: what `count` makes of it, or the length of its first array.

    Raises:
        ValueError: there is no array with an axis of samples in the batch.
    """
    if count is not None:
        return float(count(*batch))
    for leaf in jax.tree.leaves(batch):
        if jnp.ndim(leaf):
            return float(jnp.shape(leaf)[0])
    raise ValueError("a batch holds no array with an axis of samples: give a count, `(*batch) -> number of samples`")


@jax.jit
def _scaled(factor: ArrayLike, tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.asarray(factor, leaf.dtype) * leaf, tree)


@functools.partial(jax.jit, donate_argnums=0)
def _plus_scaled(total: Tree, factor: ArrayLike, tree: Tree) -> Tree:
    return jax.tree.map(lambda total, leaf: total + jnp.asarray(factor, leaf.dtype) * leaf, total, tree)
