"""A training step of a decoder, with κ by the way and in the loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from flatjax import cross_entropy, layer_relative_flatness, relative_flatness
from flatjax.models import Decoder, DecoderConfig
from harness.training.decoders import DecoderNetwork, Descent, Penalty, objective, one_step, penalty, placement, probed

CONFIG = DecoderConfig(vocab_size=16, width=8, depth=1, num_heads=2, inner_width=4)
DESCENT = Descent(steps=20, learning_rate=1e-2, warm_up=4, decay_share=0.25, weight_decay=0.1, clip=1.0)
WINDOWS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 6)))
KERNEL = "blocks/0/perceptron/up/kernel"
KEY = jax.random.key(3)


@functools.cache
def start():
    """In float64, with a tied head, and with a stream long enough that its normalisation is smooth."""
    model = Decoder(CONFIG, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    params["token_embedding"]["embedding"] *= 30
    return DecoderNetwork(graph), params


def test_kappa_by_the_way_is_relative_flatness_of_the_head():
    network, params = start()
    value, recorded = jax.jit(functools.partial(objective, network, Penalty()))(params, WINDOWS, KEY, 0.0)

    @jax.jit
    def wanted(params):
        model, tokens, labels = network.model(params), WINDOWS[:, :-1], WINDOWS[:, 1:]
        kappa = relative_flatness(model.head_params(), model.features(tokens), labels)
        return kappa, cross_entropy(model(tokens), labels).mean()

    kappa, loss = wanted(params)
    np.testing.assert_allclose(recorded["kappa"], kappa, rtol=1e-10)
    np.testing.assert_allclose([value, recorded["loss"]], loss, rtol=1e-10)


@functools.partial(jax.jit, static_argnums=0)
def probes(names, params, keys):
    """Values and gradients of the estimate on all windows."""
    network, _ = start()
    chosen = penalty(params, names, share=1.0)
    return jax.lax.map(
        lambda key: jax.value_and_grad(lambda params: probed(network, chosen, params, WINDOWS, key))(params), keys
    )


def test_the_mean_of_the_probes_is_kappa_of_the_kernel():
    network, params = start()
    exact = layer_relative_flatness(network.loss, params, WINDOWS, layer=KERNEL, method="weights").value
    values, _ = probes((KERNEL,), params, jax.random.split(KEY, 2000))
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    assert error < 0.05 * abs(exact)
    assert abs(np.mean(values) - exact) < 4 * error


def test_the_gradient_of_a_probe_is_that_by_differences_in_every_parameter():
    _, params = start()
    value_at = functools.partial(probes, ("blocks/0",))
    _, gradient = value_at(params, KEY[None])
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)

    def at(step):
        moved = jax.tree.map(lambda leaf, change: np.asarray(leaf) + step * change, params, direction)
        return value_at(moved, KEY[None])[0]

    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, change: np.sum(g[0] * change), gradient, direction)))
    np.testing.assert_allclose(slope, (at(1e-5) - at(-1e-5))[0] / 2e-5, rtol=1e-6)


def test_layers_are_named_by_what_is_at_or_above_their_kernels():
    _, params = start()
    assert penalty(params, ["head"]) == Penalty(of_head=True)
    assert penalty(params, [KERNEL]).kernels == (KERNEL,)
    of_block = penalty(params, ["blocks/0", "head", "blocks/0/attention"])
    assert of_block.of_head
    assert len(of_block.kernels) == 7
    with pytest.raises(SystemExit, match="--layers has 'blocks/1', wanted 'head', or what is at or above blocks/0"):
        penalty(params, ["blocks/1"])


def test_the_rate_warms_up_is_stable_and_decays_to_nothing():
    rates = np.array([DESCENT.rate()(step) for step in range(21)])
    np.testing.assert_allclose(rates[:4], 1e-2 * np.arange(4) / 4, atol=1e-9)
    np.testing.assert_allclose(rates[4:16], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(rates[15:], 1e-2 * np.arange(5, -1, -1) / 5, atol=1e-9)


@functools.cache
def placed_step(number, model_devices):
    """The jitted step on so many devices, and the state that it starts from."""
    network, params = start()
    chosen, optimizer = penalty(params, ["head", KERNEL], share=0.25), DESCENT.optimizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: number)
        placed = placement(model_devices, len(WINDOWS))
    state, shardings = placed.put(params, optimizer)
    step = jax.jit(functools.partial(one_step, network, chosen, optimizer), out_shardings=(shardings, None))
    return step, placed, state


def steps_on(number, model_devices):
    step_of, placed, state = placed_step(number, model_devices)
    recorded = []
    with jax.set_mesh(placed.mesh), jax.numpy_dtype_promotion("standard"):
        for step in range(3):
            state, values = step_of(state, placed.batch(np.asarray(WINDOWS)), jax.random.fold_in(KEY, step), 0.01)
            recorded.append(jax.device_get(values))
    return state, recorded


def test_a_training_step_on_8_devices_with_split_head_and_blocks_is_that_on_one():
    """Though there are two sequences to probe for the four devices that share a batch."""
    state, recorded = steps_on(8, 2)
    alone, recorded_alone = steps_on(1, 1)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert len(split) == 3 * 8  # the embedding and seven kernels, each with its two moments
    assert all(len(leaf.sharding.device_set) == 8 for leaf in split)
    for one, other in zip(recorded, recorded_alone, strict=True):
        for name, value in one.items():
            np.testing.assert_allclose(value, other[name], rtol=1e-9, err_msg=name)
    largest = jax.tree.map(lambda a, b: np.max(np.abs(np.array(a) - np.array(b))), state["params"], alone["params"])
    assert max(jax.tree.leaves(largest)) < 1e-8
    moved = optax.tree.norm(optax.tree.sub(jax.device_get(alone["params"]), start()[1]))
    assert moved > 1e-3


def test_a_training_step_with_split_head_and_blocks_is_exported_for_accelerators():
    step, placed, state = placed_step(8, 2)
    with jax.set_mesh(placed.mesh), jax.numpy_dtype_promotion("standard"):
        args = state, placed.batch(np.asarray(WINDOWS)), KEY, 0.01
        exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(*args)
        _, here = step(*args)
        _, there = exported.call(*args)
    assert exported.nr_devices == 8
    np.testing.assert_allclose(there["kappa"], here["kappa"], rtol=1e-9)


def test_devices_that_do_not_divide_are_an_error():
    with pytest.raises(SystemExit, match="--model-devices is 3, wanted a divisor of the 8"):
        placement(3, 8)
    with pytest.raises(SystemExit, match="--batch-size is 6, wanted a multiple of the 4"):
        placement(2, 6)
