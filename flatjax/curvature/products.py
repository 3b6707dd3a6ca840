"""Products of a network's curvature with vectors: exact, on trees of parameters as they lie, for one batch or many."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flatjax.core.dtypes import computing_dtype
from flatjax.core.integers import whole_number
from flatjax.core.trees import Tree, chosen_leaves, leaf_path, with_leaves
from flatjax.curvature.jaxprs import with_convolutions_in_order

LossFn = Callable[..., jax.Array]
"""A function `(params, *batch) -> scalar`, the mean over the samples of a batch."""


@runtime_checkable
class Curvature(Protocol):
    """A symmetric matrix C, known by its products with vectors.

    A vector is a tree of arrays like `like`; several of them are one tree, each leaf with a further first axis.
    """

    @property
    def like(self) -> Tree:
        """A tree like a vector: the parameters, or those leaves that were chosen, in float32 or wider."""
        ...

    def products(self, vectors: Tree, *, chunk_size: int = 1) -> Tree:
        """The product C v for each vector.

        `chunk_size` of them are in memory at a time, besides the vectors and the results.
        """
        ...

    def forms(
        self,
        draw: Callable[[Tree, Any], Tree],
        form: Callable[[Tree, Tree], Tree],
        keys: Any,
        *,
        chunk_size: int = 1,
    ) -> Tree:
        """Takes `form(v, C v)`, linear in C v, with v = `draw(like, key)` for each key.

        Only `chunk_size` vectors are in memory at a time. Both functions are best those of a module: they are compiled
        once for each.
        """
        ...

    def loop(self, step: Callable[[Callable[[Tree], Tree], Any, Any], Any], state: Any, xs: Any) -> Any:
        """Runs `state = step(products, state, x)` for x in xs.

        `products` takes stacked vectors, and all of them at once.
        """
        ...


def product(curvature: Curvature, vector: Tree) -> Tree:
    """The product C v with one vector."""
    products = curvature.products(jax.tree.map(lambda leaf: leaf[None], vector))
    return jax.tree.map(lambda leaf: leaf[0], products)


class _Linearised(abc.ABC):
    """The curvature of one batch: what multiplies a vector is made once, and then used in compiled loops."""

    @property
    @abc.abstractmethod
    def like(self) -> Tree:
        """A tree like a vector."""

    @abc.abstractmethod
    def linearised(self) -> Callable[[Tree], Tree]:
        """Makes the product with one vector."""

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
        return _forms(self, draw, form, keys, whole_number(chunk_size, "chunk_size", least=1))

    def loop(self, step: Callable[[Callable[[Tree], Tree], Any, Any], Any], state: Any, xs: Any) -> Any:
        return _loop(self, step, state, xs)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "batch"], meta_fields=["loss_fn", "leaves"])
@dataclasses.dataclass(frozen=True)
class Hessian(_Linearised):
    """The Hessian of `loss_fn(params, *batch)` in the leaves at the given paths, or in all of them.

        H v = d/dt ∇L(θ + t v) at t = 0

    A Hessian is a tree itself: it is passed through `jax.jit` with its arrays as arguments.

    Args:
        loss_fn: `(params, *batch) -> scalar`, twice differentiable, in forward mode too: a `jax.custom_vjp` has none.
        params: a tree of floating arrays: `nnx.state(model, nnx.Param)`, `variables["params"]`, or any other.
        batch: what the loss takes besides.
        leaves: paths joined by slashes, for example ("blocks/0/up/kernel",); vectors are then {path: array}. By default
            all leaves are taken, and vectors are trees like `params`.

    Raises:
        TypeError: a leaf to be differentiated is not floating, or the loss no scalar.
        ValueError: there is no leaf at a path.

    Notes:
        It is taken forward over reverse: the gradient is linearised once, and each product then costs less than two
        gradients. Only what comes after the earliest of the chosen leaves is differentiated. Vectors and products are
        in float32, or float64 where a leaf is. Those of a bfloat16 leaf are rounded to it on their way through the
        network.

    Example:
        >>> import jax.numpy as jnp
        >>> hessian = Hessian(lambda w, x: jnp.sum((x @ w) ** 3), jnp.array([1.0, 2.0]), (jnp.eye(2),))
        >>> print(product(hessian, jnp.array([1.0, 1.0])))
        [ 6. 12.]
    """

    loss_fn: LossFn
    params: Tree
    batch: tuple[Any, ...] = ()
    leaves: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_paths(self.leaves)

    @property
    def like(self) -> Tree:
        return _like(self.params, self.leaves)

    def linearised(self) -> Callable[[Tree], Tree]:
        def loss(chosen: Tree) -> jax.Array:
            return checked_scalar(self.loss_fn(_with_chosen(self.params, chosen, self.leaves), *self.batch))

        gradient = jax.grad(loss)
        return with_convolutions_in_order(jax.linearize(gradient, self.like)[1])


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "batch"], meta_fields=["predict", "loss_fn", "leaves"]
)
@dataclasses.dataclass(frozen=True)
class GaussNewton(_Linearised):
    """The generalized Gauss-Newton matrix of `loss_fn(predict(params, *batch), *batch)`.

        G v = Jᵀ (∇²_z L) J v, with J the Jacobian of the outputs z = predict(params, *batch)

    It is what is left of the Hessian where the network is linearised. It is positive semidefinite if the loss is convex
    in the outputs. Arguments and errors are those of `Hessian`.

    Example:
        >>> import jax.numpy as jnp
        >>> square = lambda z, x: 0.5 * jnp.sum(z**2)
        >>> matrix = GaussNewton(lambda w, x: x @ w, square, jnp.array([1.0, 2.0]), (jnp.diag(jnp.array([1.0, 3.0])),))
        >>> print(product(matrix, jnp.array([1.0, 1.0])))
        [1. 9.]
    """

    predict: Callable[..., Tree]
    loss_fn: Callable[..., jax.Array]
    params: Tree
    batch: tuple[Any, ...] = ()
    leaves: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_paths(self.leaves)

    @property
    def like(self) -> Tree:
        return _like(self.params, self.leaves)

    def linearised(self) -> Callable[[Tree], Tree]:
        def outputs(chosen: Tree) -> Tree:
            return self.predict(_with_chosen(self.params, chosen, self.leaves), *self.batch)

        predicted, forward = jax.linearize(outputs, self.like)
        backward = jax.linear_transpose(forward, self.like)
        curve = jax.linearize(jax.grad(lambda z: checked_scalar(self.loss_fn(z, *self.batch))), predicted)[1]
        return with_convolutions_in_order(lambda vector: backward(curve(forward(vector)))[0])


def checked_scalar(value: Any, of: str = "loss_fn") -> jax.Array:
    """Checks what a loss returned, to be differentiated.

    Raises:
        TypeError: it is no scalar of a floating dtype, for example because there is an aux beside it.
    """
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic | float)
    if is_array and jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.floating):
        return jnp.asarray(value)
    got = f"{jnp.result_type(value)}{jnp.shape(value)}" if is_array else type(value).__name__
    hint = f"the mean over the samples; and where there is aux besides, lambda *args: {of}(*args)[0]"
    raise TypeError(f"{of} returned {got}, wanted a scalar of a floating dtype: {hint}")


@functools.partial(jax.jit, static_argnames=("draw", "form", "chunk_size"))
def _forms(
    curvature: _Linearised,
    draw: Callable[[Tree, Any], Tree],
    form: Callable[[Tree, Tree], Tree],
    keys: Any,
    chunk_size: int,
) -> Tree:
    like, multiply = curvature.like, curvature.linearised()

    def of_key(key: Any) -> Tree:
        vector = draw(like, key)
        return form(vector, multiply(vector))

    return jax.lax.map(of_key, keys, batch_size=None if chunk_size == 1 else chunk_size)


@functools.partial(jax.jit, static_argnames="step")
def _loop(curvature: _Linearised, step: Callable[[Callable[[Tree], Tree], Any, Any], Any], state: Any, xs: Any) -> Any:
    multiply = curvature.linearised()

    def products(vectors: Tree) -> Tree:
        return jax.lax.map(multiply, vectors, batch_size=0 if len(jax.tree.leaves(vectors)[0]) > 1 else None)

    return jax.lax.scan(lambda state, x: (step(products, state, x), None), state, xs)[0]


def _check_paths(paths: tuple[str, ...] | None) -> None:
    if not (paths is None or isinstance(paths, tuple)):
        raise TypeError(f"leaves is {paths!r}, wanted a tuple of paths, or None for all leaves")


def _like(params: Tree, paths: tuple[str, ...] | None) -> Tree:
    """The chosen leaves, at the precision of sums."""
    return jax.tree.map(_widened, chosen_leaves(params, paths))


def _widened(leaf: ArrayLike) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(computing_dtype(leaf))


def _with_chosen(params: Tree, chosen: Tree, paths: tuple[str, ...] | None) -> Tree:
    """The parameters with the chosen leaves put back, at their own precision again."""
    given = jax.tree.map(lambda x, leaf: x.astype(jnp.result_type(leaf)), chosen, chosen_leaves(params, paths))
    return with_leaves(params, given, paths)


def given(like: Tree, vector: Tree) -> Tree:
    """Checks a vector that is not drawn, and casts it to the precision of `like`."""
    want, got = jax.tree.structure(like), jax.tree.structure(vector)
    if want != got:
        raise ValueError(f"vectors is a tree {got}, wanted one like the chosen leaves, {want}")
    return jax.tree_util.tree_map_with_path(_given_leaf, like, vector)


def _given_leaf(keys: Sequence[Any], like: jax.Array, leaf: jax.Array) -> jax.Array:
    if leaf.shape != like.shape:
        raise ValueError(
            f"vectors has at {leaf_path(keys)!r} the shape (k, *{leaf.shape}), wanted (k, *{like.shape}), k vectors "
            "along a first axis"
        )
    return leaf.astype(like.dtype)


def itself(_: Tree, product: Tree) -> Tree:
    """Returns the product, where no form is taken of it."""
    return product
