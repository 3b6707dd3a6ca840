"""Singular triplets of the residual Jacobians of a network's blocks, exact or without forming a matrix."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer, Key

from flatjax.core import results
from flatjax.core.integers import whole_number
from flatjax.core.metric import metric
from flatjax.representations.operators import (
    Block,
    Point,
    ResidualJacobian,
    points,
    stacked,
)

OVERSAMPLING = 8
"""Directions beyond those asked for, in which the smallest of these are found sooner."""


class SingularTriplets(NamedTuple):
    """The triplets of J_l = Σ_k s_k u_k v_kᵀ for each block l, the largest s_k first."""

    U: Float[Array, "l m k"]
    S: Float[Array, "l k"]
    V: Float[Array, "l m k"]
    residuals: Float[Array, "l k"]
    """‖J v − s u‖, where Jᵀu = s v: so far from s, at most, there is a singular value of J."""

    to_dict = results.to_dict
    __str__ = results.to_table

    def top(self, num_triplets: int) -> "SingularTriplets":
        """Keeps the largest triplets of each block.

        Raises:
            ValueError: there are not so many.
        """
        most = self.S.shape[-1]
        num_triplets = whole_number(num_triplets, "num_triplets")
        if not 1 <= num_triplets <= most:
            raise ValueError(f"num_triplets is {num_triplets}, wanted 1 to {most}, of which there are singular values")
        return SingularTriplets(*(x[..., :num_triplets] for x in self))

    def matrices(self) -> Float[Array, "l m m"]:
        """The matrices U S Vᵀ (l, m, m), which are J_l if these are all its triplets."""
        return jnp.einsum("...ik,...k,...jk->...ij", self.U, self.S, self.V, precision="highest")


def residual_jacobians(
    blocks: Sequence[Block],
    stream: Float[ArrayLike, "_ n t m"],
    position: int | Integer[ArrayLike, ""],
    *,
    top: int | None = None,
    key: Key[Array, ""] | None = None,
    num_iterations: int = 4,
    sequence: int = 0,
    chunk_size: int = 32,
) -> SingularTriplets:
    r"""Finds singular triplets of the residual Jacobians of all blocks at one token.

        J_l = ∂x_{l+1}/∂x_l − I,    x_{l+1} = x_l + f_l(x_l)

    with x_l (m,) the residual stream at one position of one sequence, the other positions held where they are.

    Call it outside of `jit`: it is then compiled once for all blocks of one structure, if they are pytrees, as
    `nnx.Module`s are. `jax.tree_util.Partial(apply, params)` makes a pytree of any function with parameters.

    Args:
        blocks: f with x_{l+1} = f(x_l), (n, t, m) -> (n, t, m), the residual connection included: `model.blocks`.
        stream: x_l, (l, n, t, m), what enters each block; what leaves the last may follow: `model.stream(tokens)`.
        position: which of the t positions, from the end if negative.
        top: how many triplets of each block; m by default. Static.
        key: the random key of the vectors; None for the exact method.
        num_iterations: rounds of JᵀJ after the first product. Take more where residuals are too large. Static.
        sequence: which of the n sequences. Static.
        chunk_size: how many products are in memory at a time. Static.

    Returns:
        `SingularTriplets`, stacked over the blocks, in float32 or wider. They are NaN for a block that returns what is
        not finite.

    Raises:
        TypeError: the stream is not floating, the position no integer, or a block no callable.
        ValueError: the stream does not fit the blocks; there is no such position or sequence, nor so many triplets; a
            key without `top`; a negative number of iterations, or a `chunk_size` below 1.

    Notes:
        Without a key the triplets are exact: m products a block give J, and an SVD is made of it. With a key no matrix
        is formed: the `top` largest are found by iteration on a block of top + 8 random vectors, in
        2 (num_iterations + 1) products of J or Jᵀ with each of these, and `top` more for the residuals. That is worth
        it where 10·top is far below m. Singular values so found are never too large, but for rounding.

        A product costs what the forward pass of the block over the t positions does, twice for Jᵀ. Where positions do
        not see later ones, cut these off, `stream[:, :, : position + 1]`. Blocks compute in the dtype they have: in
        bfloat16 J is known to 4e-3 of I + J at best.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flatjax import residual_jacobians
        >>> blocks = [lambda x: x + x @ jnp.diag(jnp.array([2.0, 0.5, 0.0], x.dtype)), lambda x: x + x**2]
        >>> stream = jnp.ones((2, 1, 4, 3), jnp.float32)
        >>> print(residual_jacobians(blocks, stream, position=3).S)
        [[2.  0.5 0. ]
         [2.  2.  2. ]]
        >>> print(residual_jacobians(blocks, stream, position=3, top=1, key=jax.random.key(0)).S.round(3))
        [[2.]
         [2.]]

    References:
        Li, Papyan: *Residual Alignment: Uncovering the Mechanisms of Residual Networks*, NeurIPS 2023.
        Aubry, Meng, Sugolov, Papyan: *Transformer Block Coupling and its Correlation with Generalization in LLMs*,
        2024.
        Halko, Martinsson, Tropp: *Finding Structure with Randomness*, SIAM Review 53, 2011 (the iteration).
    """
    chunk_size = whole_number(chunk_size, "chunk_size", least=1)
    num_iterations = whole_number(num_iterations, "num_iterations", least=0)
    if key is not None and top is None:
        raise ValueError("got a key, but top is None: say how many triplets to look for, or leave the key out")
    at = points(blocks, stream, position, sequence)
    num_features = at[0].inputs.shape[1]
    top = num_features if top is None else whole_number(top, "top")
    if not 1 <= top <= num_features:
        raise ValueError(f"top is {top}, wanted 1 to {num_features}, the features of the stream")
    if key is None or top + OVERSAMPLING >= num_features:
        return stacked([_exact(point, top=top, chunk_size=chunk_size) for point in at])
    options = {"top": top, "num_iterations": num_iterations, "chunk_size": chunk_size}
    return stacked([_iterated(point, key, np.int32(index), **options) for index, point in enumerate(at)])


@metric
def _exact(point: Point, *, top: int, chunk_size: int) -> SingularTriplets:
    J = ResidualJacobian(point).matrix(chunk_size)
    U, S, V, sound = _svd(J)
    triplets = SingularTriplets(U, S, V, jnp.linalg.norm(J @ V - U * S[None, :], axis=0)).top(top)
    return _marked(triplets, sound)


@metric
def _iterated(
    point: Point, key: Key[Array, ""], index: Int[ArrayLike, ""], *, top: int, num_iterations: int, chunk_size: int
) -> SingularTriplets:
    jacobian = ResidualJacobian(point)
    start = jax.random.normal(
        jax.random.fold_in(key, index), (jacobian.num_features, top + OVERSAMPLING), jacobian.dtype
    )

    def step(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        Q = _orthonormal(jacobian.times(_orthonormal(state[1]), chunk_size))
        return Q, jacobian.transposed_times(Q, chunk_size)

    Q, of_Q = jax.lax.fori_loop(0, num_iterations + 1, step, (start, start))
    # J is nearly Q Qᵀ J, of which this is the SVD.
    V, S, of_rows, sound = _svd(of_Q)
    U, S, V = (Q @ of_rows)[:, :top], S[:top], V[:, :top]
    residuals = jnp.linalg.norm(jacobian.times(V, chunk_size) - U * S[None, :], axis=0)
    return _marked(SingularTriplets(U, S, V, residuals), sound & jnp.all(jnp.isfinite(residuals)))


def _orthonormal(vectors: Float[Array, "m k"]) -> Float[Array, "m k"]:
    return jnp.linalg.qr(jnp.where(jnp.isfinite(vectors), vectors, 0))[0]


def _svd(matrix: Float[Array, "p q"]) -> tuple[Array, Array, Array, Array]:
    """U, S and V, and whether the matrix was finite: a decomposition is given nothing that is not."""
    sound = jnp.all(jnp.isfinite(matrix))
    U, S, V_transposed = jnp.linalg.svd(jnp.where(sound, matrix, 0), full_matrices=False)
    return U, S, V_transposed.T, sound


def _marked(triplets: SingularTriplets, sound: Array) -> SingularTriplets:
    return jax.tree.map(lambda x: jnp.where(sound, x, jnp.nan), triplets)
