"""Lanczos' method: a curvature on the space that it spans from one vector, and its outermost eigenvalues."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.core.integers import whole_number
from flatjax.core.trees import Tree
from flatjax.curvature.products import Curvature
from flatjax.curvature.vectors import (
    at,
    combinations,
    norm,
    normal_like,
    num_entries,
    orthonormalised,
    scale,
    with_vector,
    zeros_stack,
)


class Tridiagonal(NamedTuple):
    """The factors in C Q = Q T + r e_kᵀ, with orthonormal vectors Q and a tridiagonal matrix T."""

    diagonal: Float[Array, " k"]
    off_diagonal: Float[Array, " k"]
    """The entries beside the diagonal. The last is ‖r‖, and not in T.

    They are 0 where the vectors so far span a space that C does not leave.
    """
    basis: Tree
    """The vectors Q, stacked along the first axis."""

    def matrix(self) -> Float[Array, "k k"]:
        """The tridiagonal matrix T (k, k)."""
        off = self.off_diagonal[:-1]
        return jnp.diag(self.diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1)

    def eigenpairs(self) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
        """The eigenvalues of T, in ascending order, and its eigenvectors as columns; NaN if T is not finite."""
        # Near underflow an eigensolver squares to 0 what it should not: bring the largest entry to 1.
        size = jnp.maximum(jnp.max(jnp.abs(self.diagonal)), jnp.max(jnp.abs(self.off_diagonal)))
        size = jnp.where(size == 0, 1, size)
        matrix = self.matrix() / size
        is_finite = jnp.all(jnp.isfinite(matrix))
        values, vectors = jnp.linalg.eigh(jnp.where(is_finite, matrix, 0))
        return jnp.where(is_finite, size * values, jnp.nan), jnp.where(is_finite, vectors, jnp.nan)


class Eigenpairs(NamedTuple):
    """Approximate eigenvalues λ and orthonormal eigenvectors x."""

    eigenvalues: Float[Array, " p"]
    eigenvectors: Tree
    """The eigenvectors, stacked along the first axis."""
    residuals: Float[Array, " p"]
    """‖C x − λ x‖: so far from λ, at most, there is an eigenvalue."""


def lanczos(curvature: Curvature, key: Key[Array, ""], *, num_steps: int) -> Tridiagonal:
    """Runs Lanczos' method from a random vector, each vector made orthogonal to all before it, twice.

    Where the vectors span a space that C does not leave, it goes on from another random vector. No more steps are made
    than a vector has entries.

    Args:
        curvature: a `Hessian`, `GaussNewton`, `Streamed`, or any other.
        key: the random key of the vectors.
        num_steps: the number of products, and of vectors in memory.

    Returns:
        The `Tridiagonal` matrix and its basis.

    Raises:
        ValueError: `num_steps` is below 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.curvature.products import Hessian
        >>> hessian = Hessian(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0, 3.0]))
        >>> print(jnp.linalg.eigvalsh(lanczos(hessian, jax.random.key(0), num_steps=3).matrix()).round(4))
        [ 6. 12. 18.]

    References:
        Paige: *Accuracy and effectiveness of the Lanczos algorithm for the symmetric eigenproblem*, Linear Algebra
        Appl. 34, 1980; on why to orthogonalise.
    """
    num_steps = whole_number(num_steps, "num_steps", least=1)
    like = curvature.like
    num_steps = min(num_steps, num_entries(like))
    steps = jnp.arange(num_steps)
    return curvature.loop(_step, _start(like, key, steps), (steps, jax.random.split(key, num_steps)))


def extreme_eigenpairs(
    curvature: Curvature,
    key: Key[Array, ""],
    *,
    num_pairs: int = 1,
    num_steps: int,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
    chunk_size: int = 1,
) -> Eigenpairs:
    """Finds eigenvalues at an end of the spectrum, with eigenvectors, by Lanczos' method.

    An eigenvalue that is repeated is found once, unless the method has to start anew.

    Args:
        curvature: a `Hessian`, `GaussNewton`, `Streamed`, or any other.
        key: the random key of the vectors.
        num_pairs: how many pairs of eigenvalue and eigenvector.
        num_steps: the number of products, and of vectors in memory; several times `num_pairs`, and more where
            eigenvalues are close. Each pair costs a further product for its residual.
        which: "largest" and "smallest" by value, best first, or "magnitude", by absolute value, largest first.
        chunk_size: how many of the further products are in memory at a time.

    Returns:
        `Eigenpairs`, whose residuals say how good the pairs are; NaN if a product is.

    Raises:
        ValueError: `num_pairs` is below 1, or above the number of steps or of a vector's entries; or an unknown end.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.curvature.products import Hessian
        >>> hessian = Hessian(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0, -3.0]))
        >>> pairs = extreme_eigenpairs(hessian, jax.random.key(0), num_pairs=2, num_steps=3, which="magnitude")
        >>> print(pairs.eigenvalues.round(4))
        [-18.  12.]
        >>> print(abs(pairs.eigenvectors).round(4))
        [[0. 0. 1.]
         [0. 1. 0.]]
    """
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(f"which is {which!r}, wanted 'largest', 'smallest' or 'magnitude'")
    num_pairs, num_steps = whole_number(num_pairs, "num_pairs"), whole_number(num_steps, "num_steps", least=1)
    most = min(num_steps, num_entries(curvature.like))
    if not 1 <= num_pairs <= most:
        raise ValueError(f"num_pairs is {num_pairs}, wanted 1 to {most}, the number of steps or of a vector's entries")
    tridiagonal = lanczos(curvature, key, num_steps=num_steps)
    eigenvalues, vectors = _ritz_pairs(tridiagonal, num_pairs, which)
    products = curvature.products(vectors, chunk_size=chunk_size)
    return Eigenpairs(eigenvalues, vectors, _residuals(eigenvalues, vectors, products))


# Of the leaves only the types are used: were they left out, so were their devices.
@functools.partial(jax.jit, keep_unused=True)
def _start(like: Tree, key: Key[Array, ""], steps: Integer[Array, " k"]) -> Tridiagonal:
    first = normal_like(like, key)
    basis = with_vector(zeros_stack(like, len(steps)), 0, scale(1 / norm(first), first))
    zeros = jnp.zeros(len(steps), computing_dtype(like))
    return Tridiagonal(zeros, zeros, basis)


def _step(
    products: Callable[[Tree], Tree], state: Tridiagonal, x: tuple[Integer[Array, ""], Key[Array, ""]]
) -> Tridiagonal:
    step, key = x
    return _advanced(state, products(_vector(state.basis, step)), step, key)


@jax.jit
def _vector(basis: Tree, step: Integer[Array, ""]) -> Tree:
    return jax.tree.map(lambda leaf: leaf[None], at(basis, step))


@jax.jit
def _advanced(state: Tridiagonal, image: Tree, step: Integer[Array, ""], key: Key[Array, ""]) -> Tridiagonal:
    unit, along, length = orthonormalised(at(image, 0), state.basis, key)
    return Tridiagonal(
        state.diagonal.at[step].set(along[step]),
        state.off_diagonal.at[step].set(length),
        with_vector(state.basis, step + 1, unit),
    )


@functools.partial(jax.jit, static_argnames=("num_pairs", "which"))
def _ritz_pairs(tridiagonal: Tridiagonal, num_pairs: int, which: str) -> tuple[Float[Array, " p"], Tree]:
    eigenvalues, vectors = tridiagonal.eigenpairs()
    order = {"largest": -eigenvalues, "smallest": eigenvalues, "magnitude": -jnp.abs(eigenvalues)}[which]
    chosen = jnp.argsort(order)[:num_pairs]
    return eigenvalues[chosen], combinations(vectors[:, chosen], tridiagonal.basis)


@jax.jit
def _residuals(eigenvalues: Float[Array, " p"], vectors: Tree, products: Tree) -> Float[Array, " p"]:
    def residual(pair: tuple[Float[Array, ""], Tree, Tree]) -> Float[Array, ""]:
        eigenvalue, vector, product = pair
        return norm(jax.tree.map(lambda x, cx: cx - eigenvalue.astype(x.dtype) * x, vector, product))

    return jax.lax.map(residual, (eigenvalues, vectors, products))
