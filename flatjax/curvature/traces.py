"""The trace and the diagonal of a curvature, by random probes."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flatjax.core.dtypes import computing_dtype
from flatjax.core.integers import whole_number
from flatjax.core.trees import Tree
from flatjax.core.units import root_of_squares
from flatjax.curvature.estimate import Estimate, mean_of
from flatjax.curvature.probes import estimated
from flatjax.curvature.products import Curvature
from flatjax.curvature.vectors import inner_product, rademacher_like
from flatjax.curvature.xtrace import empty_sketch, extended, trace_of


def trace(
    curvature: Curvature,
    key: Key[Array, ""],
    *,
    num_probes: int = 16,
    relative_error: float | None = None,
    max_probes: int = 1024,
    chunk_size: int = 1,
    method: Literal["hutchinson", "xtrace"] = "hutchinson",
) -> Estimate:
    """Estimates the trace of a curvature C, without bias.

    Methods:
    * "hutchinson": the mean of ⟨v, C v⟩ over vectors v of independent entries ±1. The variance of one is
      2 Σ_{i≠j} C_ij².
    * "xtrace": each of k vectors uniform on a sphere is left out in turn. The trace on the range of C times all others
      is exact, and the one left out probes the rest. The estimate is the mean over which is left out. It is better
      where the spectrum falls: the error falls as fast.

    Args:
        curvature: a `Hessian`, `GaussNewton`, `Streamed`, or any other.
        key: the random key of the probes. The first of them are the same whatever their number.
        num_probes: how many vectors, at least 2; the first of them where `relative_error` is given. Under "xtrace" no
            more are used than a vector has entries.
        relative_error: asks for as many probes again until the standard error is at most this share of the value, in
            magnitude. Stopping when it looks small makes it a little too small: by how much falls with `num_probes`.
        max_probes: the number of probes at which it is given up, the standard error above what was asked for.
        chunk_size: how many products are in memory at a time.
        method: one of the above.

    Returns:
        An `Estimate`: value and standard_error, in the unit of the loss over that of the parameters squared, and
        num_probes, the number of vectors. It is NaN if a product is.

    Raises:
        ValueError: fewer than 2 probes, `max_probes` below `num_probes`, a `relative_error` that is not positive or is
            given inside `jit`, an unknown method, or a `chunk_size` below 1.

    Notes:
        "hutchinson" takes one product a vector, and no more vectors are in memory than `chunk_size`. "xtrace" takes two
        products a vector, and three vectors in memory for each. As the vectors left out share the others, its standard
        error is a little too small: 0.75 to 1 of the error, in spectra from flat to i⁻².

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.curvature.products import Hessian
        >>> matrix = jnp.array([[2.0, 0.03], [0.03, 3.0]])
        >>> hessian = Hessian(lambda w, a: 0.5 * w @ a @ w, jnp.zeros(2), (matrix,))
        >>> estimate = trace(hessian, jax.random.key(0), relative_error=0.02)
        >>> print(f"{estimate.value:.1f} from {estimate.num_probes} probes, {estimate.standard_error < 0.1}")
        5.0 from 16 probes, True

    References:
        Hutchinson: *A stochastic estimator of the trace of the influence matrix*, 1989.
        Epperly, Tropp, Webber: *XTrace: Making the most of every sample in stochastic trace estimation*, SIAM J. Matrix
        Anal. Appl. 45, 2024.
    """
    options = {"num_probes": num_probes, "relative_error": relative_error, "max_probes": max_probes}
    if method == "hutchinson":

        def add(samples: Float[Array, " k"], keys: Key[Array, " l"]) -> Float[Array, " n"]:
            more = curvature.forms(rademacher_like, inner_product, keys, chunk_size=chunk_size)
            return jnp.concatenate([samples, more])

        return estimated(add, mean_of, jnp.zeros(0, computing_dtype(curvature.like)), key, **options)
    if method == "xtrace":
        return estimated(
            lambda sketch, keys: extended(curvature, sketch, keys, chunk_size=chunk_size),
            trace_of,
            empty_sketch(curvature.like),
            key,
            **options,
        )
    raise ValueError(f"method is {method!r}, wanted 'hutchinson' or 'xtrace'")


def diagonal(
    curvature: Curvature,
    key: Key[Array, ""],
    *,
    num_probes: int = 16,
    relative_error: float | None = None,
    max_probes: int = 1024,
    chunk_size: int = 1,
) -> Estimate:
    """Estimates the diagonal of a curvature C, without bias.

    The estimate is the mean of v ⊙ C v over vectors v of independent entries ±1.

    Args and errors are those of `trace`. The relative error is of Euclidean norms, over all entries.

    Returns:
        An `Estimate`: value and standard_error, trees like `curvature.like`, and num_probes. An entry's variance is
        that of Σ_{j≠i} C_ij v_j, over num_probes.

    Notes:
        A `Streamed` curvature goes through its batches once for `chunk_size` probes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax.curvature.products import Hessian
        >>> hessian = Hessian(lambda w: jnp.sum(w**3), jnp.array([1.0, 2.0]))
        >>> print(diagonal(hessian, jax.random.key(0), num_probes=2).value)
        [ 6. 12.]

    References:
        Bekas, Kokiopoulou, Saad: *An estimator for the diagonal of a matrix*, Appl. Numer. Math. 57, 2007.
    """
    chunk_size = whole_number(chunk_size, "chunk_size", least=1)

    def add(moments: _Moments, keys: Key[Array, " k"]) -> _Moments:
        whole = len(keys) // chunk_size * chunk_size
        if whole:
            moments = curvature.loop(_add_probes, moments, keys[:whole].reshape(-1, chunk_size))
        return curvature.loop(_add_probes, moments, keys[None, whole:]) if whole < len(keys) else moments

    zeros = jax.tree.map(jnp.zeros_like, curvature.like)
    return estimated(
        add,
        _Moments.estimate,
        _Moments(jnp.zeros((), jnp.int32), zeros, zeros),
        key,
        num_probes=num_probes,
        relative_error=relative_error,
        max_probes=max_probes,
    )


class _Moments(NamedTuple):
    """Draws of a tree: how many there are, their mean, and how far they are from it."""

    count: Array
    mean: Tree
    distances: Tree
    """The root √Σ (x − mean)², and never its square: for small curvatures that is 0, and for large ones infinite."""

    def estimate(self) -> Estimate:
        def standard_error(distance: Array) -> Array:
            count = self.count.astype(distance.dtype)
            return distance / jnp.sqrt(count * (count - 1))

        return Estimate(self.mean, jax.tree.map(standard_error, self.distances), self.count)


def _add_probes(products: Callable[[Tree], Tree], moments: _Moments, keys: Key[Array, " k"]) -> _Moments:
    vectors = _draws(moments.mean, keys)
    return _merged(moments, vectors, products(vectors))


# Of the leaves only the types are used: were they left out, so were their devices.
@functools.partial(jax.jit, keep_unused=True)
def _draws(like: Tree, keys: Key[Array, " k"]) -> Tree:
    return jax.lax.map(lambda key: rademacher_like(like, key), keys)


@jax.jit
def _merged(moments: _Moments, vectors: Tree, products: Tree) -> _Moments:
    """Merges further draws by Chan's update."""
    count, more = moments.count, len(jax.tree.leaves(vectors)[0])
    draws = jax.tree.map(jnp.multiply, vectors, products)
    means = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), draws)

    def mean(old: Array, new: Array) -> Array:
        return old + (new - old) * (more / (count + more)).astype(old.dtype)

    def distance(distance: Array, old: Array, new: Array, draws: Array) -> Array:
        between = (new - old) * jnp.sqrt(count * more / (count + more)).astype(old.dtype)
        return root_of_squares(jnp.concatenate([draws - new[None], between[None], distance[None]]))

    return _Moments(
        count + more,
        jax.tree.map(mean, moments.mean, means),
        jax.tree.map(distance, moments.distances, moments.mean, means, draws),
    )
