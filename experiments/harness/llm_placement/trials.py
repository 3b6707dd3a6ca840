"""Train and measure small decoders alike, except for what is added to the loss, with one network on one device."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from harness.llm_placement.perturbations import rounded, with_noise
from harness.training.decoders import DecoderNetwork, Penalty, State, one_step, probed

BITS = (8, 4)
_PROBES = 16


class Trial(NamedTuple):
    """A trial is a network to be trained; with an axis in front of all fields, several."""

    strength: Any
    seed: Any
    params: Any
    batches: Any
    """Tokens of the batches (steps, batch, context + 1)."""
    held_out: Any
    """Held-out tokens (n, context + 1) of files from modules that are trained on."""
    transfer: Any
    """Held-out tokens (n, context + 1) of modules that are not trained on."""


def train(
    network: DecoderNetwork,
    penalty: Penalty,
    optimizer_of: Callable[[jax.Array], optax.GradientTransformation],
    trial: Trial,
    end: jax.Array,
) -> State:
    """Return the parameters after the first `end` of the trial's batches, with the optimizer of its strength."""
    optimizer, key = optimizer_of(trial.strength), jax.random.key(trial.seed)

    def step(i: jax.Array, state: State) -> State:
        key_of_step = jax.random.fold_in(key, i)
        return one_step(network, penalty, optimizer, state, trial.batches[i], key_of_step, trial.strength)[0]

    start = {"params": trial.params, "optimizer": optimizer.init(trial.params)}
    return jax.lax.fori_loop(0, end, step, start)["params"]


def measure(
    network: DecoderNetwork, probe: Penalty, noises: Sequence[float], draws: int, trial: Trial, params: State
) -> dict[str, jax.Array]:
    """Measure losses, κ of the head and of what is probed on held-out files, and how much the loss rises there."""
    key = jax.random.key(trial.seed)

    def loss(params: State) -> jax.Array:
        return network.loss_and_flatness(params, trial.held_out)[0]

    held_out, kappa = network.loss_and_flatness(params, trial.held_out)
    some = trial.held_out[:: max(1, len(trial.held_out) // trial.batches.shape[1])]
    probes = jax.lax.map(lambda each: probed(network, probe, params, some, each), jax.random.split(key, _PROBES))
    record = {
        "held_out": held_out,
        "transfer": network.loss_and_flatness(params, trial.transfer)[0],
        "kappa_of_head": kappa,
        "kappa_of_blocks": jnp.mean(probes),
        "kappa_of_blocks_error": jnp.std(probes, ddof=1) / jnp.sqrt(_PROBES),
    }
    for i, size in enumerate(noises):
        keys = jax.random.split(jax.random.fold_in(key, i), draws)
        noisy = jax.lax.map(lambda each, size=size: loss(with_noise(params, each, jnp.float32(size))), keys)
        record[f"noise_{size:g}"] = jnp.mean(noisy) - held_out
    return record | {f"int{bits}": loss(rounded(params, bits)) - held_out for bits in BITS}
