"""Spread the parameters of a decoder over devices."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from flatjax.core.sharding import explicit_mesh
from flatjax.core.trees import leaf_path


def decoder_shardings(params: Any, mesh: Mesh, data: str = "data", model: str = "model") -> Any:
    """Says how each of a decoder's parameters is spread over a mesh, in the tree of the parameters.

    The tokens of the vocabulary, the heads of attention and the inner width of the perceptrons are split along the axis
    `model`, where they can be divided by its size; all else, and all along `data`, is replicated. So each block sums
    over `model` twice.

    Args:
        params: `nnx.state(model, nnx.Param)` of a `Decoder`, of arrays or of shapes.
        mesh: with an axis `model`; if it has none, all is replicated.
        data: the axis that the texts are split along.
        model: the axis that the parameters are split along.

    Returns:
        `NamedSharding`s, for `jax.device_put` or `jax.jit`.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flatjax.models import Decoder, DecoderConfig
        >>> config = DecoderConfig(vocab_size=16, width=8, depth=1, num_heads=2)
        >>> params = nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param)
        >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
        >>> params = jax.device_put(params, decoder_shardings(params, mesh))
        >>> params["blocks"][0]["perceptron"]["down"]["kernel"][...].sharding.spec
        P('model', None)

    References:
        Shoeybi et al.: *Megatron-LM*, 2019.
    """
    del data
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, leaf_spec(leaf_path(keys), leaf.shape, mesh, model)), params
    )


def leaf_spec(path: str, shape: tuple[int, ...], mesh: Mesh, model: str = "model") -> PartitionSpec:
    """Says how the parameter at a path, for example "blocks/0/attention/query/kernel", is split."""
    layer, leaf = path.split("/")[-2:]
    axis = None
    if layer == "token_embedding" or (layer in ("output", "down") and leaf == "kernel"):
        axis = 0
    elif layer in ("head", "query", "key", "value", "gate", "up"):
        axis = len(shape) - 1
    is_split = axis is not None and shape[axis] % mesh.shape.get(model, shape[axis] + 1) == 0
    return PartitionSpec(*(model if is_split and axis == each else None for each in range(len(shape))))


def stream_sharding(x: Float[Array, "*leading m"]) -> NamedSharding | None:
    """The sharding of x with its last axis whole: on an explicit mesh it must be said for a sum over a split axis."""
    mesh = explicit_mesh(x)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*_spec(x)[:-1], None))


def embedding_sharding(tokens: Int[Array, "n t"], embedding: Float[Array, "d m"]) -> NamedSharding | None:
    """The sharding of what is looked up, which on an explicit mesh must be said."""
    mesh = explicit_mesh((tokens, embedding))
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*_spec(tokens), None))


def with_whole_heads(y: Float[Array, "n t c"], num_heads: int) -> Float[Array, "n t c"]:
    """Gathers y if it is split along its last axis into pieces that are not whole heads."""
    mesh, (*_, axis) = explicit_mesh(y), _spec(y)
    if mesh is None or axis is None or num_heads % mesh.shape[axis] == 0:
        return y
    return jax.sharding.reshard(y, stream_sharding(y))


def _spec(x: Array) -> tuple[Any, ...]:
    spec = jax.typeof(x).sharding.spec
    return (*spec, *(None,) * (x.ndim - len(spec)))
