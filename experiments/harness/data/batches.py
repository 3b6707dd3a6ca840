"""A step of training takes its samples from here."""

import jax
import jax.numpy as jnp
import numpy as np


def batch_at(key: jax.Array, step: jax.Array, num_samples: int, batch_size: int) -> jax.Array:
    """Return the indices of a step's batch: each epoch goes through a random order in whole batches.

    An epoch's order follows from its number alone, so that a resumed run needs to know the step and no more.
    """
    epoch, batch = jnp.divmod(step, num_samples // batch_size)
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_samples)
    return jax.lax.dynamic_slice(order, (batch * batch_size,), (batch_size,))


def all_batches(train: np.ndarray, batch_size: int, num_steps: int, seed: int) -> np.ndarray:
    """Return indices (steps, batch): each epoch goes through a random order in whole batches."""
    if batch_size > len(train):
        raise SystemExit(f"--batch-size is {batch_size}, wanted at most the {len(train)} images trained on")
    rng = np.random.default_rng((seed, 1))
    an_epoch = len(train) // batch_size
    epochs = [
        rng.permutation(train)[: an_epoch * batch_size].reshape(an_epoch, batch_size)
        for _ in range(-(-num_steps // an_epoch))
    ]
    return np.concatenate(epochs)[:num_steps].astype(np.int32)


def shuffled_epochs(size: int, wanted: int, seed: int) -> np.ndarray:
    """Return indices that go through each epoch in a random order."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(size) for _ in range(-(-wanted // size))])[:wanted]
