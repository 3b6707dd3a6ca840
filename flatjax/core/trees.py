"""Read the leaves of a tree of parameters by their paths, and put some of them in the place of all."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, KeyEntry

Tree = Any
"""A pytree of arrays."""


def leaf_path(keys: Sequence[KeyEntry]) -> str:
    """Joins the keys by slashes, "blocks/0/up/kernel"; that an NNX variable holds its array in a field is left out."""
    held = bool(keys) and keys[-1] == GetAttrKey("value")
    return jax.tree_util.keystr(tuple(keys[:-1] if held else keys), simple=True, separator="/")


def leaves_by_path(tree: Tree) -> dict[str, Any]:
    """Collects all leaves by their paths, in their order in the tree.

    Raises:
        ValueError: two of them have the same path, as those of {"a": {"b": …}, "a/b": …}.
    """
    leaves: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = leaf_path(keys)
        if path in leaves:
            raise ValueError(f"params has two leaves at {path!r}, wanted keys without slashes")
        leaves[path] = leaf
    return leaves


def arrays_by_path(tree: Tree) -> dict[str, Any]:
    """Collects the leaves of parameters by their paths; they must be arrays.

    Raises:
        TypeError: one of them is no array.
    """
    leaves = leaves_by_path(tree)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"params has at {path!r} a {type(leaf).__name__}, wanted arrays alone: of an Equinox model "
                "params, static = eqx.partition(model, eqx.is_inexact_array), and in the loss "
                "eqx.combine(params, static)"
            )
    return leaves


def chosen_leaves(tree: Tree, paths: Sequence[str] | None) -> Tree:
    """Picks the leaves at `paths` as {path: leaf}, or the tree itself.

    Raises:
        TypeError: one of them is not of a floating dtype.
        ValueError: there is no leaf at a path, or none is chosen.
    """
    leaves = arrays_by_path(tree)
    chosen = leaves if paths is None else {path: _leaf(leaves, path) for path in paths}
    if not chosen:
        raise ValueError("no leaf of params is chosen, wanted at least one")
    for path, leaf in chosen.items():
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"params has at {path!r} a leaf of dtype {jnp.result_type(leaf)}, wanted a floating dtype: leave out "
                "what is not trained, as in graphdef, params, rest = nnx.split(model, nnx.Param, ...)"
            )
    return tree if paths is None else chosen


def with_leaves(tree: Tree, chosen: Tree, paths: Sequence[str] | None) -> Tree:
    """Replaces the leaves of the tree at `paths`: what `chosen_leaves` took out is put back."""
    if paths is None:
        return chosen
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: chosen.get(leaf_path(keys), leaf), tree)


def _leaf(leaves: dict[str, Any], path: str) -> Any:
    if path not in leaves:
        raise ValueError(f"params has no leaf at {path!r}, but at {', '.join(map(repr, leaves)) or 'no path'}")
    return leaves[path]
