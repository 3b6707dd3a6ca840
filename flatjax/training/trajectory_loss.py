"""Sharpness-aware training without a second gradient: stay close to the outputs of one's own past (SAF, MESA)."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Integer

from flatjax.core.dtypes import computing_dtype
from flatjax.core.sharding import explicit_mesh
from flatjax.samples import Logits


def trajectory_loss(logits: Logits, past_logits: Logits, *, temperature: ArrayLike = 5.0) -> Float[Array, "*n"]:
    """Measures how far each sample's prediction has moved from an earlier one, which sharp minima let it do fast.

        τ² KL(softmax(z_past/τ) ‖ softmax(z/τ))

    Add it to the loss with a positive strength. In SAF z_past are the logits of the same sample some epochs ago, which
    `LogitMemory` keeps. In MESA they are those of an average of the weights.

    Args:
        logits: z (..., d).
        past_logits: z_past, of the same shape. No gradient goes there.
        temperature: τ > 0.

    Returns:
        The loss of each sample (...,) in nats, 0 or more, in float64 if either of the logits is, else in float32. NaN
        where a logit is not finite, or an array τ not positive.

    Raises:
        ValueError: the shapes differ, or a number τ is not positive.

    Notes:
        In the dtype it is computed in, the loss keeps its digits, and so does its gradient τ (softmax(z/τ) −
        softmax(z_past/τ)), however close the logits are.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> loss = trajectory_loss(jnp.array([[2.0, 0.0, -1.0]]), jnp.array([[1.0, 1.0, 0.0]]))
        >>> print(f"{loss[0]:.6f}")
        0.473036

        MESA, a step of training away from where the average began:

        >>> def logits(weights):
        ...     return jnp.array([[1.0, 2.0]]) @ weights
        >>> weights, average = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.zeros((2, 2))
        >>> average = optax.incremental_update(weights, average, step_size=1 - 0.9998)
        >>> print(f"{trajectory_loss(logits(weights), logits(average))[0]:.3f}")
        0.125

    References:
        Du, Zhou, Feng, Tan, Zhou: *Sharpness-Aware Training for Free*, NeurIPS 2022.
    """
    logits, past = jnp.asarray(logits), jnp.asarray(past_logits)
    if logits.shape != past.shape:
        raise ValueError(f"logits has shape {logits.shape} and past_logits {past.shape}, wanted the same")
    if isinstance(temperature, int | float | np.generic) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}, wanted a positive number")
    dtype = computing_dtype((logits, past))
    temperature = jnp.asarray(temperature, dtype)
    temperature = jnp.where(temperature > 0, temperature, jnp.nan)
    past = jax.lax.stop_gradient(past.astype(dtype))
    log_p = jax.nn.log_softmax(past / temperature)
    p = jnp.exp(log_p)
    change = (logits.astype(dtype) - past) / temperature
    # From that of the likeliest output: around the mean its own is then small, and known to as many digits.
    is_likeliest = jax.nn.one_hot(jnp.argmax(past, axis=-1), past.shape[-1], dtype=bool)
    change = change - jnp.sum(jnp.where(is_likeliest, change, 0), axis=-1, keepdims=True)
    deviation = change - jnp.sum(p * change, axis=-1, keepdims=True)

    # With δ the deviations from their mean under p, KL = log Σ p e^δ = log(1 + Σ p (e^δ − 1 − δ)): no term is negative.
    # Where p e^δ is above e, all is in units that keep it there.
    is_small = jnp.abs(deviation) < 1
    shift = jax.lax.stop_gradient(jnp.max(log_p + deviation, axis=-1, keepdims=True, initial=1)) - 1
    small = jnp.exp(-shift) * p * _exponential_from_second_order(jnp.where(is_small, deviation, 0))
    large = jnp.exp(log_p + deviation - shift) - jnp.exp(-shift) * p * (1 + deviation)
    excess = jnp.sum(jnp.where(is_small, small, large), axis=-1)
    shift = shift[..., 0]
    return temperature**2 * (shift + jnp.log1p(jnp.expm1(-shift) + excess))


class LogitMemory(NamedTuple):
    """The logits of every training sample in the last epochs, to compare with those of now (SAF).

    It is a pytree of num_epochs · num_samples · num_outputs numbers, to be carried through training beside the
    parameters. Donated, it is written in place. In the first `num_epochs` epochs there is nothing to compare with, and
    `trajectory_loss` is 0. It is also 0 for a sample that was not seen `num_epochs` epochs ago. SAF adds it from its
    sixth epoch on with strength 0.3.

    Example:
        >>> import jax.numpy as jnp
        >>> memory, indices = LogitMemory.init(num_samples=4, num_outputs=2, num_epochs=1), jnp.array([3, 1])
        >>> now = jnp.array([[0.0, 1.0], [2.0, 0.0]])
        >>> past, memory = memory.exchange(indices, now, epoch=0)
        >>> print(trajectory_loss(now, past))
        [0. 0.]
        >>> past, memory = memory.exchange(indices[:1], now[1:], epoch=1)
        >>> print(past)
        [[0. 1.]]

    References:
        Du, Zhou, Feng, Tan, Zhou: *Sharpness-Aware Training for Free*, NeurIPS 2022.
    """

    logits: Float[Array, "e n d"]
    due: Int[Array, "e n"]
    """The epoch in which the logits are to be compared with."""

    @classmethod
    def init(
        cls, num_samples: int, num_outputs: int, num_epochs: int = 3, *, dtype: DTypeLike = jnp.float32
    ) -> "LogitMemory":
        """A memory of no logits yet, to `exchange` with every batch.

        The comparison is over `num_epochs` epochs; in bfloat16 it takes half the memory.

        Raises:
            ValueError: one of the sizes is below 1.
        """
        shape = (num_epochs, num_samples, num_outputs)
        if min(shape) < 1:
            raise ValueError(f"num_epochs, num_samples and num_outputs are {shape}, wanted at least 1 of each")
        return cls(jnp.zeros(shape, dtype), jnp.full(shape[:2], _NEVER, jnp.int32))

    def exchange(
        self, indices: Integer[ArrayLike, "*b"], logits: Float[ArrayLike, "*b d"], epoch: Integer[ArrayLike, ""] | int
    ) -> tuple[Float[Array, "*b d"], "LogitMemory"]:
        """Exchanges a batch's logits: gives those of `num_epochs` epochs ago, and the memory with those of now.

        Args:
            indices: the places of the samples in the data set, each the same in every epoch however they are shuffled.
                A ragged last batch can be filled up with samples that it has.
            logits: the logits of now (..., d).
            epoch: the epoch, counted from 0, or from anywhere, in whole numbers.

        Returns:
            The past logits (..., d), in the dtype of `logits` and without a gradient, and the next memory. Where there
            are no past logits they are `logits` itself. They are NaN for an index that is negative or not below
            num_samples, and nothing is kept of it either.

        Raises:
            TypeError: `indices` are no integers, or `epoch` is not one.
            ValueError: the shapes do not fit.
        """
        indices, logits = jnp.asarray(indices), jax.lax.stop_gradient(jnp.asarray(logits))
        num_outputs = self.logits.shape[2]
        if not jnp.issubdtype(indices.dtype, jnp.integer):
            raise TypeError(f"indices has dtype {indices.dtype}, wanted integers")
        epoch = jnp.asarray(epoch)
        if not jnp.issubdtype(epoch.dtype, jnp.integer) or epoch.shape != ():
            raise TypeError(
                f"epoch has dtype {epoch.dtype} and shape {epoch.shape}, wanted one integer: count whole epochs"
            )
        if logits.shape != (*indices.shape, num_outputs):
            raise ValueError(
                f"logits has shape {logits.shape}, wanted {(*indices.shape, num_outputs)}: indices has shape "
                f"{indices.shape}, and the memory is of {num_outputs} outputs"
            )
        indices = indices.astype(jnp.int64 if indices.dtype.itemsize == 8 else jnp.int32)
        arguments = self, indices, logits, epoch.astype(jnp.int32)
        mesh = explicit_mesh(arguments)
        if mesh is None:
            return LogitMemory._exchanged(*arguments)
        with jax.sharding.use_abstract_mesh(mesh):
            placed = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding.spec, (logits, self))
            return cast(Callable[..., Any], jax.sharding.auto_axes(LogitMemory._exchanged, out_sharding=placed))(
                *arguments
            )

    def _exchanged(
        self, indices: Integer[Array, "*b"], logits: Float[Array, "*b d"], epoch: Int[Array, ""]
    ) -> tuple[Float[Array, "*b d"], "LogitMemory"]:
        num_epochs, num_samples, _ = self.logits.shape
        is_sample = (indices >= 0) & (indices < num_samples)
        place = epoch % num_epochs, jnp.where(is_sample, indices, num_samples).astype(jnp.int32)
        due = self.due.at[place].get(mode="fill", fill_value=_NEVER)
        stored = self.logits.at[place].get(mode="fill", fill_value=jnp.nan)
        # Made of what was read, though nothing out of range is written: else the compiler writes to a copy of it all.
        next_due = jnp.where(is_sample, epoch + num_epochs, due)
        next_logits = jnp.where(is_sample[..., None], logits.astype(stored.dtype), stored)
        past = jnp.where(((due == epoch) | ~is_sample)[..., None], stored.astype(logits.dtype), logits)
        return past, LogitMemory(
            self.logits.at[place].set(next_logits, mode="drop"), self.due.at[place].set(next_due, mode="drop")
        )


_NEVER = jnp.iinfo(jnp.int32).min


def _exponential_from_second_order(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The remainder e^x − 1 − x for |x| ≤ 1, by its series: as a difference it would cancel."""
    terms = jnp.ones_like(x)
    for k in range(19, 2, -1):
        terms = 1 + x / k * terms
    return x**2 / 2 * terms
