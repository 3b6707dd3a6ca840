"""Linear heads: the layouts in which they are kept, and their logits."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Shaped

HeadParams = Any
"""A head: a mapping or `nnx.State` with `kernel` (m, d), `weight` (d, m) or `embedding` (d, m), and optionally `bias`
(d,); or the layer of NNX, Equinox or PyTorch that has them. The name says the layout: `kernel` is (in, out), as Flax
keeps it, and `weight` (out, in), as PyTorch and Equinox do.
"""

_LAYOUTS = {"kernel": "(m, d), (in, out)", "weight": "(d, m), (out, in)", "embedding": "(d, m), (vocabulary, features)"}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix", "bias"], meta_fields=["rows_axis"])
@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A linear layer z = Wφ + b in the layout it was given in; each row of W belongs to one output.

    A transposed copy of a vocabulary's head is one array too many. What reads the head in parts transposes the parts.
    """

    matrix: Shaped[Array, "..."]
    """The matrix W (d, m) if `rows_axis` is 0, else Wᵀ."""
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
        """Whether all entries are finite: the head of a diverged network is not."""
        return jnp.all(jnp.isfinite(self.matrix)) & jnp.all(jnp.isfinite(self.bias))

    def astype(self, dtype: DTypeLike) -> "LinearHead":
        return LinearHead(self.matrix.astype(dtype), self.bias.astype(dtype), self.rows_axis)

    def squared_norm(self, dtype: DTypeLike) -> Float[Array, ""]:
        """The squared Frobenius norm ‖W‖_F²."""
        return jnp.sum(self.matrix.astype(dtype) ** 2)

    def logits(self, feats: Float[Array, "n m"]) -> Float[Array, "n d"]:
        return feats @ self.weight.T + self.bias[None, :]


def linear_head(params: HeadParams) -> LinearHead:
    """Reads a head in any of its layouts; a head without a bias gets a zero one.

    Raises:
        TypeError: `params` names no arrays, or they are not of a floating dtype.
        ValueError: `params` holds other names than a head's, or arrays of the wrong shape.
    """
    arrays = head_arrays(params)
    (name,) = arrays.keys() - {"bias"}
    matrix = _floating(name, arrays[name])
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name} has shape {matrix.shape}, wanted {_LAYOUTS[name]}, both at least 1: reshape the kernel of a "
            "general dense layer to a matrix"
        )
    rows_axis = 1 if name == "kernel" else 0
    num_outputs = matrix.shape[rows_axis]
    bias = _floating("bias", arrays["bias"]) if "bias" in arrays else jnp.zeros(num_outputs, matrix.dtype)
    if bias.shape != (num_outputs,):
        raise ValueError(
            f"bias has shape {bias.shape}, but {name} has {num_outputs} outputs, its shape being {matrix.shape}: a "
            f"kernel is (in, out), a weight or an embedding (out, in), and a bias ({num_outputs},)"
        )
    return LinearHead(matrix, bias, rows_axis)


def head_arrays(params: HeadParams) -> dict[str, Any]:
    """Collects the matrix of a head, under the name that says its layout, and its `bias` if it has one.

    Raises:
        TypeError: `params` is nothing that names its arrays.
        ValueError: it holds other names than a head's.
    """
    named = _named(params)
    if named.keys() == {"params"}:  # the variables of a Linen layer
        named = _named(named["params"])
    names = named.keys() - {"bias"}
    if len(names) != 1 or not names <= _LAYOUTS.keys():
        several = " and ".join(sorted(names & _LAYOUTS.keys()))
        raise ValueError(
            f"params has the keys {sorted(named)}, wanted one of 'kernel' (m, d), 'weight' (d, m) and 'embedding' "
            "(d, m), and 'bias' (d,) if there is one: "
            + (f"of {several} give one" if len(names & _LAYOUTS.keys()) > 1 else _where_heads_are(named))
        )
    return named


def _named(params: Any) -> dict[str, Any]:
    """Collects the arrays of a mapping or a layer by their names, and leaves out None."""
    if callable(getattr(params, "state_dict", None)):  # a layer of PyTorch
        params = params.state_dict()
    if isinstance(params, Mapping):
        return {str(name): value for name, value in params.items() if value is not None}
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda node: hasattr(node, "__jax_array__"))
    if not leaves or any(not path or not isinstance(path[0], jax.tree_util.GetAttrKey) for path, _ in leaves):
        shape = getattr(params, "shape", None)
        got = f"{type(params).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")
        raise TypeError(
            f"params is a {got}, wanted a mapping that names its layout: {{'kernel': W}} for W (in, out), as Flax "
            "keeps it, {'weight': W} for W (out, in), as PyTorch and Equinox do, {'embedding': W} for W (vocabulary, "
            "features), each with 'bias' if there is one; or the layer itself"
        )
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _where_heads_are(named: dict[str, Any]) -> str:
    """Says what to pass instead, if `params` is more than a head."""

    def is_leaf(node: Any) -> bool:
        return not isinstance(node, Mapping)

    found = []
    for path, _ in jax.tree_util.tree_leaves_with_path(named, is_leaf=is_leaf):
        *above, name = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if above and name in _LAYOUTS:
            found.append(".".join(above))
    of = f", those of {', '.join(map(repr, found[-3:]))} say" if found else ""
    return f"pass the parameters of the head alone{of}"


def _floating(name: str, value: Any) -> Float[Array, "..."]:
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {array.dtype}, wanted a floating dtype")
    return array
