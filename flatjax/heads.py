"""What a linear head is: the layouts it is kept in, and its logits."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

HeadParams = Mapping[str, Any]
"""A head as Flax keeps it: `{"kernel": (m, d)}` or `{"embedding": (d, m)}`, and optionally `"bias": (d,)`."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix", "bias"], meta_fields=["rows_axis"])
@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A linear layer z = Wφ + b, with one row of W an output, in the layout it was given in.

    A transposed copy of a vocabulary's head is one array too many: what reads it in parts transposes the parts.
    """

    matrix: Shaped[Array, "..."]
    """W (d, m) if `rows_axis` is 0, else Wᵀ."""
    bias: Shaped[Array, " d"]
    rows_axis: int = 0

    @property
    def weight(self) -> Shaped[Array, "d m"]:
        return self.matrix.T if self.rows_axis else self.matrix

    @property
    def num_outputs(self) -> int:
        return self.matrix.shape[self.rows_axis]

    @property
    def num_features(self) -> int:
        return self.matrix.shape[1 - self.rows_axis]

    @property
    def is_finite(self) -> Bool[Array, ""]:
        """That of a diverged network is not."""
        return jnp.all(jnp.isfinite(self.matrix)) & jnp.all(jnp.isfinite(self.bias))

    def astype(self, dtype: DTypeLike) -> "LinearHead":
        return LinearHead(self.matrix.astype(dtype), self.bias.astype(dtype), self.rows_axis)

    def squared_norm(self, dtype: DTypeLike) -> Float[Array, ""]:
        """‖W‖_F²."""
        return jnp.sum(self.matrix.astype(dtype) ** 2)

    def logits(self, feats: Float[Array, "n m"]) -> Float[Array, "n d"]:
        return feats @ self.weight.T + self.bias[None, :]


def linear_head(params: HeadParams) -> LinearHead:
    """Reads a head in any of its layouts; a head without a bias gets a zero one.

    Raises:
        TypeError: `params` is no mapping, or its arrays are not of a floating dtype.
        ValueError: `params` holds other keys than a head's, or arrays of the wrong shape.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"params is a {type(params).__name__}, wanted a mapping with 'kernel' (m, d) or 'embedding' (d, m): "
            "pass nnx.state(layer) for an NNX layer, variables['params'][name] for a Linen one"
        )
    keys = {key for key in params if params[key] is not None}
    if keys - {"bias"} not in ({"kernel"}, {"embedding"}):
        raise ValueError(
            f"params has the keys {sorted(map(str, params))}, wanted 'kernel' (m, d) or 'embedding' (d, m), "
            "and 'bias' (d,) if there is one: pass the parameters of the head alone, params['head'] say, and a weight "
            "(out, in) as {'kernel': weight.T}"
        )
    (name,) = keys - {"bias"}
    matrix = _floating(name, params[name])
    if matrix.ndim != 2 or 0 in matrix.shape:
        wanted = "(m, d), (in, out)" if name == "kernel" else "(d, m), (vocabulary, features)"
        raise ValueError(
            f"{name} has shape {matrix.shape}, wanted {wanted}, both at least 1: reshape the kernel of a general "
            "dense layer to a matrix"
        )
    rows_axis = 1 if name == "kernel" else 0
    num_outputs = matrix.shape[rows_axis]
    bias = _floating("bias", params["bias"]) if "bias" in keys else jnp.zeros(num_outputs, matrix.dtype)
    if bias.shape != (num_outputs,):
        raise ValueError(
            f"bias has shape {bias.shape}, but {name} has {num_outputs} outputs, its shape being {matrix.shape}: a "
            f"kernel is (in, out), an embedding (out, in), and a bias ({num_outputs},)"
        )
    return LinearHead(matrix, bias, rows_axis)


def _floating(name: str, value: Any) -> Float[Array, "..."]:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}, wanted a floating dtype")
    return array
