"""Train a decoder: cross-entropy with κ of the head on the way, λκ of any layer in the loss, and a step.

κ of the head is exact. κ of other kernels is estimated by ⟨v, H v⟩, with one random direction v = (W_l A_l)_l through
all of them a step. Its mean is Σ_l κ_l, so that the mean of its gradient, through H and through v, is the gradient of
Σ_l κ_l. It is taken on some of a batch's sequences, for which the same holds: on all of them it costs up to twelve
times the rest of the step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flatjax import cross_entropy, cross_entropy_and_flatness, sampled_flatness
from flatjax.core.dtypes import computing_dtype
from flatjax.layers import find_layers
from flatjax.models import Decoder, DecoderConfig, decoder_shardings
from harness.data.text import Part

State = dict[str, Any]
"""A state holds parameters and the optimizer's state."""

HEAD = "head"
"""The head has this name, tied to the embedding or not."""


class DecoderNetwork(NamedTuple):
    """A decoder network holds the decoder's structure."""

    graph: nnx.GraphDef

    def model(self, params: State) -> Decoder:
        return nnx.merge(self.graph, params)

    def loss_and_flatness(self, params: State, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the next token's cross-entropy, in nats per token, and κ of the head, on windows (n, t + 1)."""
        model = self.model(params)
        return cross_entropy_and_flatness(model.head_params(), model.features(windows[:, :-1]), windows[:, 1:])

    def loss(self, params: State, windows: jax.Array) -> jax.Array:
        logits = self.model(params)(windows[:, :-1])
        return cross_entropy(logits.astype(computing_dtype(logits)), windows[:, 1:]).mean()


def network(config: DecoderConfig, seed: int, dtype: Any = jnp.float32) -> tuple[DecoderNetwork, State]:
    """Return a decoder's structure and its parameters, which are in float32; it computes in `dtype`."""
    graph, params = nnx.split(Decoder(config, dtype=dtype, rngs=nnx.Rngs(seed)), nnx.Param)
    return DecoderNetwork(graph), nnx.to_pure_dict(params)


class Penalty(NamedTuple):
    """A penalty says which κ is added to the loss."""

    of_head: bool = False
    kernels: tuple[str, ...] = ()
    """Paths of the penalised kernels."""
    share: float = 0.25
    """Share of a batch's sequences that κ of the kernels is taken on; one sequence at least."""


def penalty(params: State, names: Sequence[str], share: float = 0.25) -> Penalty:
    """Build the penalty by the names of kernels, of what holds them, as `blocks/2`, or `head`.

    Raises:
        SystemExit: no kernel has one of the names.
    """
    kernels = [path for path in find_layers(params) if not path.startswith((f"{HEAD}/", "token_", "position_"))]
    chosen: list[str] = []
    for name in names:
        found = [path for path in kernels if f"{path}/".startswith(f"{name}/")]
        if not found and name != HEAD:
            raise SystemExit(f"--layers has {name!r}, wanted {HEAD!r}, or what is at or above {', '.join(kernels)}")
        chosen += found
    return Penalty(HEAD in names, tuple(dict.fromkeys(chosen)), share)


def objective(
    network: DecoderNetwork, penalty: Penalty, params: State, windows: jax.Array, key: jax.Array, strength: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return L + λ Σκ, with what is recorded: L, κ of the head, and the kernels' estimate if it is asked for."""
    loss, kappa = network.loss_and_flatness(params, windows)
    recorded = {"loss": loss, "kappa": kappa}
    added = kappa if penalty.of_head else jnp.zeros_like(kappa)
    if penalty.kernels:
        recorded["kappa_of_layers"] = probed(network, penalty, params, windows, key)
        added += recorded["kappa_of_layers"]
    # A loss that nothing is added to is not to become NaN by 0 · ∞.
    is_plain = not (penalty.of_head or penalty.kernels)
    return loss if is_plain else loss + strength * added, recorded


def probed(network: DecoderNetwork, penalty: Penalty, params: State, windows: jax.Array, key: jax.Array) -> jax.Array:
    """Estimate Σ_l κ_l of the kernels by one random direction, on the first of the windows."""
    some = _first(windows, max(1, round(penalty.share * len(windows))))
    layers = [find_layers(params)[path] for path in penalty.kernels]
    return sampled_flatness(network.loss, params, some, layers=layers, key=key)


def _first(windows: jax.Array, number: int) -> jax.Array:
    """Take the first windows: on a mesh equally many per device, or all on every device where that is not possible.

    Windows spread unevenly give an embedding that is split a wrong gradient (jax 0.10.2).
    """
    mesh, some = jax.sharding.get_abstract_mesh(), windows[:number]
    if "data" not in mesh.axis_names:
        return some
    is_even = number % mesh.shape["data"] == 0
    return jax.lax.with_sharding_constraint(some, PartitionSpec("data") if is_even else PartitionSpec())


def one_step(
    network: DecoderNetwork,
    penalty: Penalty,
    optimizer: optax.GradientTransformation,
    state: State,
    windows: jax.Array,
    key: jax.Array,
    strength: jax.Array,
) -> tuple[State, dict[str, jax.Array]]:
    """Take one step, and return what was recorded before it, with the norm of the gradient."""

    def gradient(params: State, _: Any = None) -> tuple[State, dict[str, jax.Array]]:
        return jax.grad(objective, argnums=2, has_aux=True)(network, penalty, params, windows, key, strength)

    params = state["params"]
    grads, recorded = gradient(params)
    updates, optimizer_state = optax.with_extra_args_support(optimizer).update(
        grads, state["optimizer"], params, grad_fn=lambda *perturbed: gradient(*perturbed)[0]
    )
    new_state = {"params": optax.apply_updates(params, updates), "optimizer": optimizer_state}
    return new_state, recorded | {"gradient_norm": optax.tree.norm(grads)}


class Descent(NamedTuple):
    """Descend by AdamW with clipped gradients, at a rate that warms up, stays, and decays to 0 (WSD)."""

    steps: int
    learning_rate: float
    warm_up: int
    decay_share: float
    """Share of the steps in which the rate decays."""
    weight_decay: float
    clip: float
    """Largest norm of a gradient."""

    def rate(self) -> optax.Schedule:
        decay = max(1, round(self.decay_share * self.steps))
        pieces = [
            optax.linear_schedule(0.0, self.learning_rate, self.warm_up),
            optax.constant_schedule(self.learning_rate),
            optax.linear_schedule(self.learning_rate, 0.0, decay),
        ]
        return optax.join_schedules(pieces, [self.warm_up, max(self.warm_up, self.steps - decay)])

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.rate(), b2=0.95, weight_decay=self.weight_decay, mask=_is_matrix),
        )


def _is_matrix(params: State) -> Any:
    """Say whether a parameter is decayed: no scale of a normalisation is, and no bias."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class Placement(NamedTuple):
    """A placement splits sequences along `data`, and vocabulary, heads and inner widths along `model`."""

    mesh: Mesh

    def put(self, params: State, optimizer: optax.GradientTransformation) -> tuple[State, State]:
        """Return the state that training starts from, and its shardings."""
        of_params = decoder_shardings(params, self.mesh)
        whole = NamedSharding(self.mesh, PartitionSpec())
        start = optimizer.init(params)
        of_optimizer = optax.tree.map_params(
            optimizer.init, lambda _, sharding: sharding, start, of_params, transform_non_params=lambda _: whole
        )
        shardings = {"params": of_params, "optimizer": of_optimizer}
        return jax.device_put({"params": params, "optimizer": start}, shardings), shardings

    def batch(self, windows: np.ndarray) -> jax.Array:
        return jax.device_put(windows, NamedSharding(self.mesh, PartitionSpec("data")))


def placement(model_devices: int, batch_size: int) -> Placement:
    """Place a state on all devices, with the given number of them along `model`.

    Raises:
        SystemExit: the sizes do not divide.
    """
    number = jax.device_count()
    if model_devices < 1 or number % model_devices:
        raise SystemExit(f"--model-devices is {model_devices}, wanted a divisor of the {number} devices there are")
    if batch_size % (number // model_devices):
        raise SystemExit(
            f"--batch-size is {batch_size}, wanted a multiple of the {number // model_devices} devices that share it"
        )
    shape = number // model_devices, model_devices
    return Placement(jax.make_mesh(shape, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2))


def evaluating(
    network: DecoderNetwork, placement: Placement, parts: Mapping[Part, np.ndarray], batch_size: int
) -> Callable[[State], dict[str, float]]:
    """Return `<part>_loss` and `<part>_kappa`, the means over whole batches."""
    measure = jax.jit(network.loss_and_flatness)
    batches = {
        part: [placement.batch(rows[i : i + batch_size]) for i in range(0, len(rows) - batch_size + 1, batch_size)]
        for part, rows in parts.items()
    }
    if short := [part for part in batches if not batches[part]]:
        raise SystemExit(f"of text {' and '.join(short)} has no batch of --batch-size {batch_size}: give more")

    def evaluate(state: State) -> dict[str, float]:
        record = {}
        for part, of_part in batches.items():
            values = np.array(jax.device_get([measure(state["params"], batch) for batch in of_part]), float)
            record |= dict(zip((f"{part}_loss", f"{part}_kappa"), values.mean(axis=0).tolist(), strict=True))
        return record

    return evaluate
