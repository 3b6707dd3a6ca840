"""A step of training takes its samples from here."""

import jax
import jax.numpy as jnp


def batch_at(key: jax.Array, step: jax.Array, num_samples: int, batch_size: int) -> jax.Array:
    """Return the indices of a step's batch: each epoch goes through a random order in whole batches.

    An epoch's order follows from its number alone, so that a resumed run needs to know the step and no more.
    """
    epoch, batch = jnp.divmod(step, num_samples // batch_size)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_samples)
    return jax.lax.dynamic_slice(order, (batch * batch_size,), (batch_size,))
