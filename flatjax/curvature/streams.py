"""The curvature of a data set, batch by batch."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from flatjax.core.trees import Tree
from flatjax.curvature.counts import counted
from flatjax.curvature.products import Curvature, given, itself


@dataclasses.dataclass(frozen=True)
class Streamed:
    """The curvature of a data set's loss, from that of its batches: Σ_b n_b C_b / Σ_b n_b, exactly.

    Args:
        of_batch: `(*batch) -> Curvature`, such as `lambda x, y: Hessian(loss_fn, params, (x, y))`. Let `loss_fn` be one
            function for all batches, or each is compiled anew.
        batches: tuples of arrays, in a list or a loader. They are gone through once for each call of `products`: an
            iterator would be used up by then.
        count: `(*batch) -> n_b`, how many samples the loss is the mean of. By default it is what
            `flatjax.curvature.num_samples` reads off a batch: labels that are not −100, by their weights if there are
            any, else the length of the first array that is no key of random numbers.

    Raises:
        TypeError: `batches` is an iterator.
        ValueError: there is no batch, or none with a sample that counts.
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
        total, total_count = None, 0
        for batch in self.batches:
            count = counted(batch, self.count)
            forms = self.of_batch(*batch).forms(draw, form, keys, chunk_size=chunk_size)
            total = _scaled(count, forms) if total is None else _plus_scaled(total, count, forms)
            total_count += count
        if total is None:
            raise ValueError("batches is empty, wanted at least one batch")
        if not isinstance(total_count, jax.core.Tracer) and total_count == 0:
            raise ValueError("batches holds no samples that count, wanted at least one")
        return jax.tree.map(lambda leaf: leaf / jnp.asarray(total_count, leaf.dtype), total)

    def loop(self, step: Callable[[Callable[[Tree], Tree], Any, Any], Any], state: Any, xs: Any) -> Any:
        def products(vectors: Tree) -> Tree:
            return self.products(vectors, chunk_size=len(jax.tree.leaves(vectors)[0]))

        for i in range(len(jax.tree.leaves(xs)[0])):
            state = step(products, state, jax.tree.map(lambda leaf, i=i: leaf[i], xs))
        return state


def check_batches(batches: Iterable[tuple[Any, ...]]) -> None:
    """Raises a TypeError for an iterator: a second reading of it would find nothing."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches is an iterator ({type(batches).__name__}), which is used up once it was gone through: "
            "wanted a list or a loader that can be gone through again"
        )


@jax.jit
def _scaled(factor: ArrayLike, tree: Tree) -> Tree:
    """Scales a tree; 0 times what is no number is 0: the mean of no samples."""
    return jax.tree.map(lambda leaf: jnp.where(factor == 0, 0, jnp.asarray(factor, leaf.dtype) * leaf), tree)


@functools.partial(jax.jit, donate_argnums=0)
def _plus_scaled(total: Tree, factor: ArrayLike, tree: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, _scaled(factor, tree))
