"""The distance from past predictions against 50 digits of it, and the memory of logits against a list of them."""

import decimal
import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax.training import LogitMemory, trajectory_loss


def softmax(logits, temperature):
    scaled = [decimal.Decimal(float(z)) / decimal.Decimal(temperature) for z in logits]
    exponentials = [z.exp() for z in scaled]
    return [e / sum(exponentials) for e in exponentials]


def exact(logits, past, temperature=5.0):
    """τ² KL, and its gradient τ (q − p) in the logits, with 50 digits: a difference of near numbers needs them."""
    with decimal.localcontext(prec=50, Emin=-999999, Emax=999999):
        q, p, tau = softmax(logits, temperature), softmax(past, temperature), decimal.Decimal(temperature)
        loss = tau**2 * sum(a * (a / b).ln() for a, b in zip(p, q, strict=True))
        return float(loss), np.array([float(tau * (b - a)) for a, b in zip(p, q, strict=True)])


@helpers.jit_as_usual
def values_and_gradients(logits, past, temperature=5.0):
    """Of each sample."""
    loss_of = functools.partial(trajectory_loss, temperature=temperature)
    return jax.vmap(jax.value_and_grad(loss_of))(logits, past)


def assert_exact(logits, past, rtol, **options):
    """The loss to `rtol`, and the gradient to `rtol` of its norm."""
    losses, gradients = values_and_gradients(logits, past, **options)
    for i in range(len(losses)):
        loss, gradient = exact(logits[i], past[i], **options)
        np.testing.assert_allclose(losses[i], loss, rtol=rtol, atol=0)
        np.testing.assert_allclose(gradients[i], gradient, rtol=0, atol=rtol * np.linalg.norm(gradient))


def test_it_is_the_value_worked_out_by_hand():
    assert (
        f"{trajectory_loss(jnp.array([[2.0, 0, -1]]), jnp.array([[1.0, 1, 0]]), temperature=5.0)[0]:.6f}" == "0.473036"
    )


@pytest.mark.parametrize("temperature", [0.7, 5.0])
def test_it_is_the_divergence_and_its_gradient_in_float64(temperature):
    logits, past = 3 * np.random.default_rng(0).normal(size=(2, 6, 5))
    assert_exact(logits, past, 1e-13, temperature=temperature)


def test_its_gradient_is_that_of_finite_differences_and_none_goes_into_the_past():
    logits, past = np.random.default_rng(0).normal(size=(2, 2, 3, 5))
    direction, h = np.random.default_rng(1).normal(size=logits.shape), 1e-5
    losses = jax.jit(trajectory_loss)
    differences = (losses(logits + h * direction, past) - losses(logits - h * direction, past)) / (2 * h)
    gradient_of_both = jax.grad(lambda z, past: jnp.sum(trajectory_loss(z, past)), argnums=(0, 1))
    gradient, into_past = jax.jit(gradient_of_both)(logits, past)
    assert differences.shape == (2, 3)
    np.testing.assert_allclose(jnp.sum(gradient * direction, axis=-1), differences, rtol=1e-8)
    np.testing.assert_array_equal(into_past, np.zeros(past.shape))


def test_its_hessian_at_the_past_is_that_of_cross_entropy():
    """τ² KL ≈ ½ Δzᵀ (diag p − ppᵀ) Δz, with p of temperature τ."""
    past = np.random.default_rng(0).normal(size=5)
    p = np.array([float(x) for x in softmax(past, 3)])
    got = jax.jit(jax.hessian(lambda z: trajectory_loss(z, past, temperature=3.0)))(past)
    np.testing.assert_allclose(got, np.diag(p) - np.outer(p, p), rtol=1e-13)


# From 1e-13, where in float32 two logarithms differ by their rounding errors, to thousands; of predictions from
# undecided to sure of one class to 1e-17.
@pytest.mark.parametrize("move", [1e-6, 1e-3, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("confidence", [0.0, 1.0, 30.0, 200.0])
def test_float32_keeps_the_digits_of_small_and_of_large_changes(move, confidence):
    rng = np.random.default_rng(0)
    past = np.float32(rng.normal(size=(8, 7)))
    past[np.arange(8), np.arange(8) % 7] += np.float32(confidence)
    logits = np.float32(past + move * rng.normal(size=past.shape))
    assert_exact(logits, past, 1e-5)


def test_where_nothing_has_changed_it_is_zero_and_so_is_its_gradient():
    for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
        logits = jnp.asarray(30 * np.random.default_rng(0).normal(size=(6, 5)), dtype)
        losses, gradients = values_and_gradients(logits, logits)
        np.testing.assert_array_equal(losses, np.zeros(6))
        np.testing.assert_array_equal(gradients.astype(float), np.zeros((6, 5)))


def test_it_is_computed_in_float32_at_least():
    logits, past = np.random.default_rng(0).normal(size=(2, 4, 5))
    low, low_past = jnp.asarray(logits, jnp.bfloat16), jnp.asarray(past, jnp.bfloat16)
    got = jax.jit(trajectory_loss)(low, low_past)
    assert got.dtype == jnp.float32
    want = [exact(z, y)[0] for z, y in zip(low, low_past, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert trajectory_loss(low, jnp.asarray(past)).dtype == jnp.float64
    assert trajectory_loss(low, low_past, temperature=jnp.asarray(5.0, jnp.float64)).dtype == jnp.float32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_logit_that_is_not_finite_makes_its_sample_nan(bad, which):
    both = np.random.default_rng(0).normal(size=(2, 3, 5))
    both[which, 1, 2] = bad
    np.testing.assert_array_equal(np.isnan(jax.jit(trajectory_loss)(*both)), [False, True, False])


def test_logits_of_different_shapes_are_an_error():
    with helpers.raises(ValueError, match=r"logits has shape \(3, 5\) and past_logits \(5,\), wanted the same"):
        trajectory_loss(jnp.ones((3, 5)), jnp.ones(5))


@pytest.mark.parametrize("temperature", [0, 0.0, -5.0, np.nan])
def test_a_temperature_that_is_not_positive_is_an_error_and_of_an_array_nan(temperature):
    logits, past = np.random.default_rng(0).normal(size=(2, 3, 5))
    with helpers.raises(ValueError, match=f"temperature is {temperature}, wanted a positive number"):
        jax.jit(functools.partial(trajectory_loss, temperature=temperature))(logits, past)
    for loss in (trajectory_loss, jax.jit(trajectory_loss)):
        np.testing.assert_array_equal(loss(logits, past, temperature=jnp.asarray(temperature)), np.full(3, np.nan))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_samples_split_among_devices_stay_there(axis_type):
    logits, past = np.random.default_rng(0).normal(size=(2, 16, 5))
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(axis_type,)), PartitionSpec("data"))
    losses, gradients = values_and_gradients(*jax.device_put((logits, past), sharding))
    assert losses.sharding.is_equivalent_to(sharding, 1)
    assert gradients.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(losses, [exact(z, y)[0] for z, y in zip(logits, past, strict=True)], rtol=1e-12)


NUM_SAMPLES, NUM_OUTPUTS = 11, 3


def batches(num_passes, seed=0):
    """Of shuffled passes over the data, a ragged last one included: (epoch, indices, logits)."""
    rng = np.random.default_rng(seed)
    for epoch in range(num_passes):
        for indices in np.split(rng.permutation(NUM_SAMPLES), [4, 8]):
            yield epoch, indices, rng.normal(size=(len(indices), NUM_OUTPUTS))


@functools.partial(jax.jit, donate_argnums=0)
def exchange(memory, indices, logits, epoch):
    return memory.exchange(indices, logits, epoch)


kept = jax.jit(LogitMemory.exchange)


@pytest.mark.parametrize("num_epochs", [1, 3])
def test_each_sample_gets_its_own_logits_of_so_many_epochs_ago(num_epochs):
    memory, seen = LogitMemory.init(NUM_SAMPLES, NUM_OUTPUTS, num_epochs, dtype=jnp.float64), {}
    for epoch, indices, logits in batches(3 * num_epochs + 1):
        before = memory
        past, memory = exchange(memory, indices, logits, epoch)
        assert before.logits.is_deleted()
        if epoch < num_epochs:
            np.testing.assert_array_equal(past, logits)
            np.testing.assert_array_equal(trajectory_loss(logits, past), np.zeros(len(logits)))
        else:
            np.testing.assert_array_equal(past, [seen[epoch - num_epochs, i] for i in indices])
        seen |= {(epoch, i): z for i, z in zip(indices, logits, strict=True)}


def test_a_donated_memory_is_not_copied():
    memory = LogitMemory.init(10_000, NUM_OUTPUTS)
    compiled = exchange.lower(memory, jnp.arange(4), jnp.zeros((4, NUM_OUTPUTS)), 0).compile().memory_analysis()
    assert compiled.alias_size_in_bytes >= memory.logits.nbytes + memory.due.nbytes
    assert compiled.temp_size_in_bytes < memory.due.nbytes / 10


def test_a_memory_is_carried_through_a_scan():
    steps = [step for step in batches(4) if len(step[1]) == 4]
    epochs, indices, logits = (np.stack(x) for x in zip(*steps, strict=True))

    def compare(memory, step):
        past, memory = memory.exchange(step[1], step[2], step[0])
        return memory, past

    memory = LogitMemory.init(NUM_SAMPLES, NUM_OUTPUTS, 1)
    _, got = jax.jit(lambda steps: jax.lax.scan(compare, memory, steps))((epochs, indices, logits))
    for i, step in enumerate(steps):
        want, memory = kept(memory, step[1], jnp.asarray(step[2]), step[0])
        np.testing.assert_array_equal(got[i], want)


def test_a_sample_that_was_not_seen_so_many_epochs_ago_has_no_past():
    memory, everyone, zeros = LogitMemory.init(3, 2, num_epochs=2), jnp.arange(3), jnp.zeros((3, 2))
    _, memory = kept(memory, everyone, zeros + 1, 0)
    _, memory = kept(memory, everyone, zeros + 2, 1)
    past, memory = kept(memory, everyone[:2], zeros[:2] + 3, 2)
    np.testing.assert_array_equal(past, [[1, 1], [1, 1]])
    _, memory = kept(memory, everyone, zeros + 4, 3)
    past, memory = kept(memory, everyone, zeros + 5, 4)
    np.testing.assert_array_equal(past, [[3, 3], [3, 3], [5, 5]])
    # Seen twice in an epoch, it has one past, which was due the first time.
    np.testing.assert_array_equal(kept(memory, everyone, zeros + 6, 4)[0], zeros + 6)


def test_an_index_out_of_range_has_a_past_of_nan_and_leaves_the_memory_alone():
    full = LogitMemory.init(4, 2, num_epochs=1).exchange(jnp.arange(4), jnp.arange(8.0).reshape(4, 2), 0)[1]
    for dtype in (jnp.int64, jnp.int32, jnp.int8):
        past, memory = kept(full, jnp.array([-1, 4, 2, 100], dtype), jnp.full((4, 2), 9.0), 1)
        np.testing.assert_array_equal(past, [[np.nan] * 2, [np.nan] * 2, [4, 5], [np.nan] * 2])
        np.testing.assert_array_equal(memory.logits[0], [[0, 1], [2, 3], [9, 9], [6, 7]])
        np.testing.assert_array_equal(memory.due[0], [1, 1, 2, 1])
    assert np.all(np.isnan(trajectory_loss(jnp.full((4, 2), 9.0), past)) == [True, True, False, True])


def test_through_a_memory_no_gradient_flows_and_in_an_epoch_without_a_past_none_at_all():
    memory = LogitMemory.init(3, 2, num_epochs=1)

    def loss(logits, memory, epoch):
        past, memory = memory.exchange(jnp.arange(3), logits, epoch)
        return jnp.sum(trajectory_loss(logits, past)) + jnp.sum(memory.logits) + jnp.sum(past), memory

    first, then = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    gradient_of = jax.jit(jax.grad(loss, has_aux=True))
    gradient, memory = gradient_of(jnp.asarray(first), memory, 0)
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))
    gradient, _ = gradient_of(jnp.asarray(then), memory, 1)
    np.testing.assert_allclose(gradient, [exact(z, y)[1] for z, y in zip(then, first, strict=True)], rtol=1e-5)


def test_a_memory_in_bfloat16_gives_logits_in_the_dtype_of_those_of_now():
    logits, memory = jnp.array([[1 / 3, 2.0]]), LogitMemory.init(1, 2, 1, dtype=jnp.bfloat16)
    past, memory = kept(memory, jnp.array([0]), logits, 0)
    np.testing.assert_array_equal(past, logits)
    past, memory = kept(memory, jnp.array([0]), logits, 1)
    assert (past.dtype, memory.logits.dtype) == (logits.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(past, logits.astype(jnp.bfloat16).astype(logits.dtype))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_memory_and_a_batch_may_be_split_among_devices(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    by_sample, by_row = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in [(None, "data"), ("data",)])
    memory = jax.device_put(LogitMemory.init(16, 2, 1), by_sample)
    rng = np.random.default_rng(0)
    indices = [rng.permutation(16)[:8] for _ in range(2)]
    logits = rng.normal(size=(2, 8, 2)).astype(np.float32)
    for epoch in range(2):
        past, memory = exchange(memory, *jax.device_put((indices[epoch], logits[epoch]), by_row), epoch)
    first = dict(zip(indices[0], logits[0], strict=True))
    np.testing.assert_array_equal(past, [first.get(i, z) for i, z in zip(indices[1], logits[1], strict=True)])
    assert memory.logits.sharding.is_equivalent_to(by_sample, 3)


def test_what_does_not_fit_a_memory_is_an_error_that_says_so():
    memory = LogitMemory.init(4, 2)
    with helpers.raises(TypeError, match="indices has dtype float64, wanted integers"):
        memory.exchange(jnp.zeros(3), jnp.zeros((3, 2)), 0)
    for epoch in (1.0, np.float32(1.5), jnp.ones(())):
        with helpers.raises(
            TypeError, match=r"epoch has dtype float\d\d and shape \(\), wanted one integer: count whole"
        ):
            jax.jit(memory.exchange)(jnp.arange(3), jnp.zeros((3, 2)), epoch)
    with helpers.raises(TypeError, match=r"epoch has dtype int\d\d and shape \(3,\), wanted one integer"):
        memory.exchange(jnp.arange(3), jnp.zeros((3, 2)), jnp.arange(3))
    with helpers.raises(ValueError, match=r"logits has shape \(3, 5\), wanted \(3, 2\)"):
        memory.exchange(jnp.arange(3), jnp.zeros((3, 5)), 0)
    with helpers.raises(ValueError, match="wanted at least 1 of each"):
        LogitMemory.init(4, 2, 0)
