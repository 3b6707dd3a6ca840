"""Follow a token through the blocks: how straight its way is, how even its steps, how its size grows."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flatjax.core.dtypes import computing_dtype
from flatjax.core.metric import metric


@metric
def line_shape_score(stream: Float[ArrayLike, "l *n m"]) -> Float[Array, "*n"]:
    """Measures how far the steps of each token point in different directions: 1 if in one, √L if at right angles.

        L / ‖Σ_l (x_{l+1} − x_l)/‖x_{l+1} − x_l‖‖

    With `spacing_variation` it says how near a token's way is to equally spaced points on a line (RA1).

    Args:
        stream: the residual stream before the first of L blocks and after each (L + 1, ..., m): `model.stream(tokens)`.

    Returns:
        The score of each token (...,), in float32 or wider. It is infinite if the steps lead nowhere, and NaN where one
        has the length 0, or a number is not finite.

    Raises:
        TypeError: the stream is not floating.
        ValueError: it is not of one block or more.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.representations import line_shape_score
        >>> print(line_shape_score(jnp.array([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 3.0]]])).round(3))
        [1.414]

    References:
        Gai, Zhang: *A Mathematical Principle of Deep Learning: Learn the Geodesic Curve in the Wasserstein Space*,
        2021.
        Aubry, Meng, Sugolov, Papyan: *Transformer Block Coupling and its Correlation with Generalization in LLMs*,
        2024.
    """
    steps = _steps(stream, 1)
    directions = steps / jnp.linalg.norm(steps, axis=-1, keepdims=True)
    return len(steps) / jnp.linalg.norm(jnp.sum(directions, axis=0), axis=-1)


@metric
def spacing_variation(stream: Float[ArrayLike, "l *n m"]) -> Float[Array, "*n"]:
    """Coefficient of variation, over the blocks, of the length ‖x_{l+1} − x_l‖ of a token's steps: 0 if all are equal.

    Args, Returns and Raises are those of `line_shape_score`, but for two blocks or more; the standard deviation is that
    of the blocks, ddof 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.representations import spacing_variation
        >>> print(spacing_variation(jnp.array([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 3.0]]])))
        [0.5]
    """
    return _variation(jnp.linalg.norm(_steps(stream, 2), axis=-1))


@metric
def growth_variation(stream: Float[ArrayLike, "l *n m"]) -> Float[Array, "*n"]:
    """Coefficient of variation, over the blocks, of log(‖x_{l+1}‖/‖x_l‖): 0 if a token's size grows exponentially.

    The mean that the standard deviation is divided by is taken without its sign. Where the size ends as it began it is
    0, and the coefficient infinite.

    Args, Returns and Raises are those of `line_shape_score`, but for two blocks or more; the standard deviation is that
    of the blocks, ddof 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from flatjax.representations import growth_variation
        >>> print(growth_variation(jnp.array([[[1.0, 0.0]], [[0.0, 2.0]], [[4.0, 0.0]]])))
        [0.]

    References:
        Aubry, Meng, Sugolov, Papyan: *Transformer Block Coupling and its Correlation with Generalization in LLMs*,
        2024.
    """
    sizes = jnp.log(jnp.linalg.norm(_checked(stream, 2), axis=-1))
    return _variation(sizes[1:] - sizes[:-1])


def _steps(stream: ArrayLike, fewest_blocks: int) -> Float[Array, "l *n m"]:
    x = _checked(stream, fewest_blocks)
    return x[1:] - x[:-1]


def _checked(stream: ArrayLike, fewest_blocks: int) -> Float[Array, "l *n m"]:
    stream = jnp.asarray(stream)
    if not jnp.issubdtype(stream.dtype, jnp.floating):
        raise TypeError(f"stream has dtype {stream.dtype}, wanted a floating dtype")
    if stream.ndim < 2 or len(stream) <= fewest_blocks:
        raise ValueError(
            f"stream has shape {stream.shape}, wanted (l, ..., m), l at least {fewest_blocks + 1}: before the first "
            "block, and after each"
        )
    return stream.astype(computing_dtype(stream))


def _variation(values: Float[Array, "l ..."]) -> Float[Array, "..."]:
    mean = jnp.mean(values, axis=0)
    return jnp.sqrt(jnp.mean((values - mean[None]) ** 2, axis=0)) / jnp.abs(mean)
