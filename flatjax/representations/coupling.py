"""Block coupling: whether one block acts on the stream along the singular vectors of another, as strongly as it can."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flatjax.core.dtypes import computing_dtype
from flatjax.core.integers import whole_number
from flatjax.core.metric import metric
from flatjax.representations.jacobians import SingularTriplets
from flatjax.representations.projections import Projections


@metric
def block_coupling(first: Float[ArrayLike, "m m"], second: Float[ArrayLike, "m m"], *, top: int) -> Float[Array, ""]:
    """The coupling m_K of two residual Jacobians: 0 where they share their top K singular vectors, about 1 where none.

        m_K(J_1, J_2) = ‖ |U_2ᵀ J_1 V_2| − S_1 ‖_F / ‖s_1‖

    with U_2 and V_2 the top K singular vectors of J_2, and s_1 the top K singular values of J_1, the diagonal of S_1.
    It is not symmetric. Where singular values of J_2 are the same, their vectors are any of many, and so is m_K.

    Args:
        first: J_1 (m, m).
        second: J_2 (m, m).
        top: K, from 1 to m. Static.

    Returns:
        m_K, without a unit, in float64 if either is, else in float32. It is NaN where an entry is not finite, or J_1
        is 0.

    Raises:
        ValueError: the matrices are not square and of one size, or K is not in 1 to m.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.representations import block_coupling
        >>> J = jnp.array([[3.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
        >>> print(f"{block_coupling(J, 5 * J, top=2):.3f} {block_coupling(J, J[::-1], top=2):.3f}")
        0.000 0.845

    References:
        Aubry, Meng, Sugolov, Papyan: *Transformer Block Coupling and its Correlation with Generalization in LLMs*,
        2024.
    """
    first, second = jnp.asarray(first), jnp.asarray(second)
    if first.ndim != 2 or first.shape[0] != first.shape[1] or first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape} and second {second.shape}, wanted (m, m) of both")
    top = whole_number(top, "top")
    if not 1 <= top <= len(first):
        raise ValueError(f"top is {top}, wanted 1 to {len(first)}, the features")
    dtype = computing_dtype((first, second))
    first, second = first.astype(dtype), second.astype(dtype)
    sound = jnp.all(jnp.isfinite(first)) & jnp.all(jnp.isfinite(second))
    first, second = jnp.where(sound, first, jnp.nan), jnp.where(sound, second, 0)
    U, _, V_transposed = jnp.linalg.svd(second, full_matrices=False)
    sizes = jnp.linalg.svd(jnp.where(sound, first, 0), compute_uv=False)[:top]
    return _distance(U[:, :top].T @ first @ V_transposed[:top].T, sizes)


@metric
def block_couplings(triplets: SingularTriplets, projections: Projections) -> Float[Array, "l l"]:
    """Block coupling m_K(J_i, J_j) of all pairs of blocks, at [i, j]; 0 where i = j.

    Args:
        triplets: the top K of each block.
        projections: the blocks' Jacobians between these, from `projections` or `residual_projections`.

    Raises:
        ValueError: the two are of other blocks, or of another K.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax import residual_jacobians
        >>> from flatjax.representations import block_couplings, projections
        >>> blocks = [lambda x, s=s: x + x @ jnp.diag(jnp.array([s, 1.0, 0.0], x.dtype)) for s in (2.0, 3.0)]
        >>> triplets = residual_jacobians(blocks, jnp.ones((2, 1, 4, 3), jnp.float32), position=0)
        >>> top = triplets.top(2)
        >>> print(block_couplings(top, projections(triplets.matrices(), top)).round(3))
        [[0. 0.]
         [0. 0.]]
    """
    num_blocks, top = triplets.S.shape
    if projections.forward.shape != (num_blocks, num_blocks, top, top):
        raise ValueError(
            f"projections.forward has shape {projections.forward.shape}, wanted {(num_blocks, num_blocks, top, top)}, "
            f"as triplets.S has {triplets.S.shape}"
        )
    return _distance(projections.forward, triplets.S[:, None])


def _distance(projection: Float[Array, "*l k k"], sizes: Float[Array, "*#l k"]) -> Float[Array, "*l"]:
    """The distance ‖ |P| − diag(s) ‖_F / ‖s‖."""
    is_diagonal = jnp.eye(sizes.shape[-1], dtype=bool)
    excess = jnp.abs(projection) - jnp.where(is_diagonal, sizes[..., None], 0)
    return jnp.sqrt(jnp.sum(excess**2, axis=(-2, -1)) / jnp.sum(sizes**2, axis=-1))
