"""Train several networks in one program that differ in their seed, under the same intervention."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flatjax import cross_entropy, relative_flatness, simplified_relative_flatness
from harness.data.batches import batch_at
from harness.interventions.arms import Rule, control_of, distance_from_level, measured, of_size
from harness.interventions.bounds import Bounds, softened_ncc
from harness.interventions.learners import Learner, Params, Samples
from harness.training.parallel import Parallel

State = dict[str, Any]


class Setting(NamedTuple):
    """A setting says how all networks are trained and bounded."""

    optimizer: optax.GradientTransformation
    steps_at_a_time: int
    batch_size: int
    """Samples per step; 0 stands for all."""
    bounds: Bounds

    def softened_ncc(self, feats: jax.Array, labels: jax.Array, num_classes: int) -> jax.Array:
        return softened_ncc(feats, labels, num_classes, self.bounds.softness * self.bounds.feature_norm**2)


class SeedData(NamedTuple):
    """A seed brings its samples and its number; an axis in front stands for several seeds."""

    samples: Samples
    seed: Any


class SeedTrainer:
    """The networks of some seeds are split among the devices, under one rule."""

    def __init__(self, learner: Learner, setting: Setting, rule: Rule, seeds: Sequence[int]):
        self.learner, self.setting, self.rule, self.num_seeds = learner, setting, rule, len(seeds)
        self._seeds, self._parallel = seeds, Parallel(at_most=len(seeds))
        self._data = self._parallel.stack([SeedData(learner.samples(seed), np.int32(seed)) for seed in seeds])
        self._advance = self._parallel.map(functools.partial(advance, learner, setting, rule), num_split=2)
        self._measure = self._parallel.map(functools.partial(measure, learner, setting), num_split=2)

    def start(self) -> State:
        starts = []
        for seed in self._seeds:
            params = bounded(self.setting, self.learner.start(seed))
            starts.append({"params": params, "optimizer": self.setting.optimizer.init(params)})
        return self._parallel.stack(starts)

    def advance(self, state: State, first_step: int, strength: float, level: float) -> State:
        """Advance all networks by `steps_at_a_time`."""
        return self._advance(state, self._data, np.int32(first_step), np.float32(strength), np.float32(level))

    def measure(self, state: State) -> list[dict[str, float]]:
        """Measure all networks, with an entry per seed."""
        values = jax.device_get(self._measure(state, self._data))
        return [{name: float(each[i]) for name, each in values.items()} for i in range(self.num_seeds)]


def bounded(setting: Setting, params: Any) -> Params:
    """Return the parameters with the head projected on its ball."""
    return params | {"head": setting.bounds.head(params["head"])}


def logits_of(head: dict[str, jax.Array], feats: jax.Array) -> jax.Array:
    logits = feats @ head["kernel"]
    return logits + head["bias"][None, :] if "bias" in head else logits


def advance(
    learner: Learner,
    setting: Setting,
    rule: Rule,
    state: State,
    data: SeedData,
    first_step: Any,
    strength: Any,
    level: Any,
) -> State:
    """Train one network for some steps."""
    x, y = data.samples.train_x, data.samples.train_y

    def one_step(state: State, step: jax.Array) -> tuple[State, None]:
        batch = x, y
        if setting.batch_size:
            key = jax.random.fold_in(jax.random.key(data.seed), 0)
            chosen = batch_at(key, step, len(y), setting.batch_size)
            batch = x[chosen], y[chosen]
        grads = gradient(learner, setting, rule, state["params"], *batch, strength, level)
        updates, optimizer_state = setting.optimizer.update(grads, state["optimizer"], state["params"])
        params = bounded(setting, optax.apply_updates(state["params"], updates))
        return {"params": params, "optimizer": optimizer_state}, None

    return jax.lax.scan(one_step, state, first_step + jnp.arange(setting.steps_at_a_time, dtype=jnp.int32))[0]


def gradient(
    learner: Learner,
    setting: Setting,
    rule: Rule,
    params: Params,
    x: jax.Array,
    y: jax.Array,
    strength: Any,
    level: Any,
) -> Params:
    """Return the gradient of the loss and of what the rule adds."""

    def loss(params: Params) -> jax.Array:
        return cross_entropy(logits_of(params["head"], setting.bounds.features(learner.features(params, x))), y).mean()

    def term(params: Params) -> jax.Array:
        head, feats = params["head"], setting.bounds.features(learner.features(params, x))
        assert rule.quantity is not None
        if rule.is_held:
            value = measured(rule.quantity, head, feats, y, learner.num_classes)
            return strength * distance_from_level(value, level)
        if rule.quantity == "ncc":
            return strength * setting.softened_ncc(feats, y, learner.num_classes)
        return strength * measured(rule.quantity, head, feats, y, learner.num_classes)

    def control(params: Params) -> jax.Array:
        assert rule.control is not None
        return control_of(
            rule.control, params, logits_of(params["head"], setting.bounds.features(learner.features(params, x))), y
        )

    if rule.quantity is None:
        return jax.grad(loss)(params)
    if rule.control is None:
        return jax.grad(lambda params: loss(params) + term(params))(params)
    added = of_size(jax.grad(control)(params), like=jax.grad(term)(params))
    return optax.tree.add(jax.grad(loss)(params), added)


def measure(learner: Learner, setting: Setting, state: State, data: SeedData) -> dict[str, jax.Array]:
    """Measure the whole training and held-out sets; accuracy is NaN for a network that diverged."""
    params, samples = state["params"], data.samples
    results: dict[str, jax.Array] = {"head_norm": jnp.linalg.norm(params["head"]["kernel"])}
    for part, x, y in (
        ("train", samples.train_x, samples.train_y),
        ("held_out", samples.held_out_x, samples.held_out_y),
    ):
        feats, head = setting.bounds.features(learner.features(params, x)), params["head"]
        logits = logits_of(head, feats)
        right = jnp.mean((jnp.argmax(logits, axis=1) == y).astype(feats.dtype))
        of_part = {
            "loss": cross_entropy(logits, y).mean(),
            "accuracy": jnp.where(jnp.all(jnp.isfinite(logits)), right, jnp.nan),
            "relative_flatness": relative_flatness(head, feats, y),
            "simplified_relative_flatness": simplified_relative_flatness(head, feats, y),
            "ncc": measured("ncc", head, feats, y, learner.num_classes),
            "softened_ncc": setting.softened_ncc(feats, y, learner.num_classes),
            "largest_feature": jnp.max(jnp.linalg.norm(feats, axis=1)),
        }
        results |= {f"{part}_{name}": value for name, value in of_part.items()}
    return results
