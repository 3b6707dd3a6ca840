"""A head in parts of equally many rows, each to be read where it lies, and the sums over the parts.

On a mesh where the compiler splits the work, a head has as many parts as there are devices, if its rows can be so
split. Each device then reads the parts it holds, and only sums are ever sent. Inside a `jax.shard_map` a device has
parts of its own, and the others lie along mesh axes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Integer, Shaped

from flatjax.core.sharding import num_devices, sum_over_devices
from flatjax.heads import LinearHead

AxisNames = tuple[str, ...]
"""Names of axes of the mesh of a `jax.shard_map`."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["matrix", "bias"], meta_fields=["rows_axis", "axis_names"]
)
@dataclasses.dataclass(frozen=True)
class SplitHead:
    """A head in k parts of p rows, and in as many on every other device along `axis_names`."""

    matrix: Shaped[Array, "_ _ _"]
    """The parts, (k, p, m) if `rows_axis` is 0, else (m, k, p)."""
    bias: Shaped[Array, "k p"]
    rows_axis: int
    axis_names: AxisNames

    @property
    def num_rows(self) -> int:
        """The number of rows of a part."""
        return self.bias.shape[1]

    def first_outputs(self, dtype: DTypeLike) -> Integer[Array, " k"]:
        """The output, counted over all devices, that the first row of each part belongs to."""
        num_parts = len(self.bias)
        device = jax.lax.axis_index(self.axis_names).astype(dtype) if self.axis_names else 0
        return (device * num_parts + jnp.arange(num_parts, dtype=dtype)) * self.num_rows

    def predicted(self, feats: Float[Array, "n m"], num_rows: int) -> "Predicted":
        """The mean of the rows under the probabilities of a few samples, as well as the head's dtype knows it.

        It is NaN where logits overflow. It comes with `num_rows` rows from all over the head, for which the head is not
        read again.
        """
        dtype = feats.dtype
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)
        feats = feats.astype(self.matrix.dtype)
        # The orders of axes are those for which XLA lays out no copy of the head.
        if self.rows_axis:
            logits = jnp.transpose(product("nm,mkp->nkp", feats, self.matrix), (1, 0, 2))
        else:
            logits = jnp.transpose(product("kpm,nm->kpn", self.matrix, feats), (0, 2, 1))
        logits += self.bias.astype(dtype)[:, None, :]
        largest = total_max(jnp.max(logits, axis=2), self.axis_names)
        e = jnp.exp(logits - largest[None, :, None])
        mass = total(jnp.sum(e, axis=2), self.axis_names)
        # The largest is left out, not subtracted; of several largest logits all but one are among the rest.
        is_largest = logits == largest[None, :, None]
        rest = total(jnp.sum(jnp.where(is_largest, 0, e), axis=2), self.axis_names)
        rest += total(jnp.sum(is_largest, axis=2, dtype=dtype), self.axis_names) - 1
        bias = self.bias.astype(dtype)
        biases = jnp.einsum("knp,kp->kn", e, jnp.where(bias == -jnp.inf, 0, bias))
        e = jnp.concatenate([e, self._picking(num_rows).astype(dtype)], axis=1).astype(self.matrix.dtype)
        if self.rows_axis:
            rows = jnp.transpose(product("mkp,knp->kmn", self.matrix, e), (0, 2, 1))
        else:
            rows = product("knp,kpm->knm", e, self.matrix)
        rows, biases = total(rows, self.axis_names), total(biases, self.axis_names)
        n = len(feats)
        return Predicted(rows[:n] / mass[:, None], biases / mass, rest / mass, rows[n:])

    def _picking(self, num_rows: int) -> Bool[Array, "k r p"]:
        """Marks where rows at equal distances, among those of all devices, are in the parts."""
        num_outputs = self.bias.size * (jax.lax.axis_size(self.axis_names) if self.axis_names else 1)
        chosen = np.linspace(0, num_outputs - 1, min(num_rows, num_outputs)).round().astype(np.int32)
        outputs = self.first_outputs(jnp.int32)[:, None] + jnp.arange(self.num_rows, dtype=jnp.int32)[None, :]
        return outputs[:, None, :] == chosen[None, :, None]


class Predicted(NamedTuple):
    """Means under the probabilities of a few samples."""

    rows: Float[Array, "n m"]
    biases: Float[Array, " n"]
    rest: Float[Array, " n"]
    """The probability that is left beside the largest."""
    some_rows: Float[Array, "r m"]
    """Some rows of the head as they are."""


def split(head: LinearHead, axis_names: AxisNames, like: Any) -> SplitHead:
    """Splits a head into as many parts as there are devices on its mesh, or on that of `like`."""
    num_parts = math.gcd(head.num_outputs, num_devices((head, like)))
    parts = num_parts, head.num_outputs // num_parts
    shape = list(head.matrix.shape)
    shape[head.rows_axis : head.rows_axis + 1] = parts
    return SplitHead(head.matrix.reshape(shape), head.bias.reshape(parts), head.rows_axis, axis_names)


def map_parts(function: Callable[..., Any], heads: tuple[SplitHead, ...], *arrays: Shaped[Array, "k ..."]) -> Any:
    """Applies `function(*heads, *arrays)` to each part, a `LinearHead` for a head.

    The results lie along a first axis.
    """
    rows_axis = heads[0].rows_axis

    def of_part(matrices: list[Array], biases: list[Array], arrays: list[Array]) -> Any:
        parts = (LinearHead(matrix, bias, rows_axis) for matrix, bias in zip(matrices, biases, strict=True))
        return function(*parts, *arrays)

    arguments = [head.matrix for head in heads], [head.bias for head in heads], list(arrays)
    axes = rows_axis, 0, 0
    if len(heads[0].bias) > 1:
        return jax.vmap(of_part, in_axes=axes)(*arguments)
    # An axis of one entry costs a loop of XLA's a tenth of its time on a CPU.
    result = of_part(*([jnp.squeeze(x, axis) for x in xs] for xs, axis in zip(arguments, axes, strict=True)))
    return jax.tree.map(lambda x: x[None], result)


def total(parts: Shaped[Array, "k ..."], axis_names: AxisNames) -> Shaped[Array, "..."]:
    """The sum over all parts, those along the first axis and those of all devices along mesh axes."""
    return sum_over_devices(jnp.sum(parts, axis=0, dtype=parts.dtype), axis_names)


def total_max(parts: Shaped[Array, "k ..."], axis_names: AxisNames) -> Shaped[Array, "..."]:
    """The largest of all parts; it has no derivative."""
    largest = jnp.max(parts, axis=0)
    return jax.lax.pmax(largest, axis_names) if axis_names else largest
