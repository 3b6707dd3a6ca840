"""The injected update is λ∇κ: of the whole network or of its head, anywhere in a chain, and in what wraps chains."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax import cross_entropy_and_flatness, flat_reg, relative_flatness, simplified_relative_flatness

from .cases import (
    added,
    assert_trees_close,
    dense_kappa,
    dense_penalty,
    features,
    loss,
    network,
    penalty,
    samples,
    some_updates,
)

RATE = 0.3


@pytest.fixture
def promoting():
    """What optax adds to a gradient is promoted in silence."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def kappa_of(state):
    return optax.tree.get(state, "kappa")


def run(tx, params, batches, gradient_of=None):
    """Steps of a loss with what the chain adds to it."""
    state = tx.init(params)
    for batch in batches:
        grads = loss_gradient(params, batch) if gradient_of is None else gradient_of(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        params = optax.apply_updates(params, updates)
    return params, state


# Compiled as wholes, once for all tests.
loss_gradient, dense_gradient = jax.jit(jax.grad(loss)), jax.jit(jax.grad(dense_penalty))
dense_head_gradient = jax.jit(jax.grad(dense_kappa))


def joint_gradient(params, batch, rate=RATE):
    """That of the loss and of κ by its definition."""
    return added(loss_gradient(params, batch), rate, dense_gradient(params, batch))


# The gradient.


@pytest.mark.parametrize("rate", [RATE, -RATE])
def test_what_a_penalty_adds_is_the_whole_gradient_of_kappa_by_definition(rate):
    params, batch = network(), samples()
    updates = some_updates(params)
    tx = flat_reg(rate, penalty)
    got, state = tx.update(updates, tx.init(params), params, batch=batch)
    gradient = dense_gradient(params, batch)
    assert all(np.max(np.abs(leaf)) > 1e-3 for leaf in jax.tree.leaves(gradient))  # the body's, too
    assert_trees_close(got, added(updates, rate, gradient), 1e-12)
    np.testing.assert_allclose(state.kappa, dense_penalty(params, batch), rtol=1e-6)


@pytest.mark.parametrize("part", [("body", "kernel"), ("body", "bias"), ("head", "kernel"), ("head", "bias")])
def test_it_is_the_slope_of_kappa_by_finite_differences(part):
    params, batch = network(), samples()
    direction = jax.tree.map(jnp.zeros_like, params)
    direction[part[0]][part[1]] = some_updates(params)[part[0]][part[1]]
    tx = flat_reg(1.0, penalty)
    got, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
    slope = sum(jnp.sum(a * b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(direction), strict=True))
    step = 1e-5
    ahead, behind = (dense_penalty(added(params, sign * step, direction), batch) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-7)


def test_features_that_are_parameters_get_their_gradient():
    _, labels = samples()
    params = network()["head"] | {"feats": features(network(), samples()[0])}

    def of(kappa, params):
        return kappa({name: params[name] for name in ("kernel", "bias")}, params["feats"], labels)

    tx = flat_reg(1.0, lambda params, batch: of(relative_flatness, params))
    got, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=0)
    assert_trees_close(got, jax.grad(functools.partial(of, dense_kappa))(params), 1e-12)


@pytest.mark.parametrize("head", ["head", None])
def test_a_head_alone_gets_its_own_gradient_at_fixed_features(head):
    params, (x, labels) = network(), samples()
    feats = features(params, x)
    gradient = dense_head_gradient(params["head"], feats, labels)
    if head is None:
        params = params["head"]
    else:
        gradient = {"body": jax.tree.map(jnp.zeros_like, params["body"]), "head": gradient}
    updates = some_updates(params)
    tx = flat_reg(RATE, head=head)
    got, state = jax.jit(tx.update)(updates, tx.init(params), params, feats=feats, labels=labels)
    assert_trees_close(got, added(updates, RATE, gradient), 1e-12)
    np.testing.assert_allclose(state.kappa, dense_kappa(network()["head"], feats, labels), rtol=1e-6)


def test_a_head_may_lie_deep_and_be_an_embedding():
    head, (x, labels) = network()["head"], samples()
    params = {"decoder": [{"embed": {"embedding": head["kernel"].T}}, {"other": {"kernel": jnp.ones((2, 2))}}]}
    tx = flat_reg(1.0, head="decoder/0/embed", metric=simplified_relative_flatness)
    zeros = jax.tree.map(jnp.zeros_like, params)
    feats = features(network(), x)
    got, _ = tx.update(zeros, tx.init(params), params, feats=feats, labels=labels)
    want = jax.grad(simplified_relative_flatness)({"embedding": head["kernel"].T}, feats, labels)
    assert_trees_close(got["decoder"][0]["embed"], want)
    assert_trees_close(got["decoder"][1], zeros["decoder"][1])


def test_the_joint_loss_has_the_same_gradient():
    params, (x, labels) = network(), samples()

    def objective(params):
        cross_entropy, kappa = cross_entropy_and_flatness(params["head"], features(params, x), labels)
        return cross_entropy + RATE * kappa

    assert_trees_close(jax.grad(objective)(params), joint_gradient(params, (x, labels)), 1e-12)


# Where it stands in a chain.


def test_before_the_optimizer_it_is_part_of_the_gradient(promoting):
    params, batches = network(), [samples(seed=seed) for seed in range(4)]
    got, _ = run(optax.chain(flat_reg(RATE, penalty), optax.adamw(1e-2)), params, batches)
    want, _ = run(optax.with_extra_args_support(optax.adamw(1e-2)), params, batches, joint_gradient)
    assert_trees_close(got, want)


def test_after_the_preconditioner_it_is_decoupled(promoting):
    params, batch, rate = network(), samples(), 1e-2
    tx = optax.chain(optax.scale_by_adam(), flat_reg(RATE, penalty), optax.scale_by_learning_rate(rate))
    got, _ = run(tx, params, [batch])
    direction, _ = optax.scale_by_adam().update(loss_gradient(params, batch), optax.scale_by_adam().init(params))
    want = added(params, -rate, added(direction, RATE, dense_gradient(params, batch)))
    assert_trees_close(got, want)


def test_a_strength_may_be_a_schedule_of_the_updates():
    params, batch = network(), samples()
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = flat_reg(lambda count: jnp.where(count < 2, 0.0, count.astype(float)), penalty)
    state, gradient = tx.init(params), dense_gradient(params, batch)
    for rate in (0, 0, 2, 3):
        got, state = tx.update(zeros, state, params, batch=batch)
        assert_trees_close(got, added(zeros, rate, gradient))
    assert state.count == 4


# What wraps chains.


class NnxNetwork(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.body, self.head = nnx.Linear(5, 7, rngs=rngs), nnx.Linear(7, 4, rngs=rngs)

    def features(self, x):
        return jnp.tanh(self.body(x))


@pytest.mark.parametrize("by", ["penalty", "head"])
def test_in_an_nnx_optimizer(by):
    model, (x, labels) = NnxNetwork(), samples(dtype=np.float32)
    graphdef, before = nnx.split(model, nnx.Param)
    before = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), nnx.to_pure_dict(before))

    def penalty(params, batch):
        return relative_flatness(params["head"], nnx.merge(graphdef, params).features(batch[0]), batch[1])

    def model_loss(model):
        logits = model.head(model.features(x))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def step(model, optimizer):
        needed = {"batch": (x, labels)} if by == "penalty" else {"feats": model.features(x), "labels": labels}
        optimizer.update(model, nnx.grad(model_loss)(model), **needed)

    tx = flat_reg(RATE, penalty) if by == "penalty" else flat_reg(RATE, head="head")
    optimizer = nnx.Optimizer(model, optax.chain(tx, optax.sgd(0.1)), wrt=nnx.Param)
    step(model, optimizer)
    got = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    batch = x.astype(float), labels
    gradient = dense_gradient(before, batch)
    if by == "head":
        gradient["body"] = jax.tree.map(jnp.zeros_like, gradient["body"])
    want = added(before, -0.1, added(loss_gradient(before, batch), RATE, gradient))
    assert_trees_close(got, want, 1e-5)
    np.testing.assert_allclose(optimizer.opt_state[0].kappa[...], dense_penalty(before, batch), rtol=1e-5)


def test_in_a_linen_train_state_by_the_two_lines_of_the_docstring():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="head", param_dtype=float)(nn.tanh(nn.Dense(7, name="body", param_dtype=float)(x)))

    (x, labels), model = samples(), Network()
    params = model.init(jax.random.key(0), x)["params"]
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1))
    )
    batch = x, labels
    grads = loss_gradient(state.params, batch)
    with pytest.raises(TypeError, match=r"TrainState\.apply_gradients, which passes no arguments on: call state.tx"):
        state.apply_gradients(grads=grads)
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, batch=batch)
    state = state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    assert_trees_close(state.params, added(params, -0.1, joint_gradient(params, batch)))


def test_before_multi_steps_every_batch_counts(promoting):
    params, batches = network(), [samples(seed=seed) for seed in range(3)]
    tx = optax.chain(flat_reg(RATE, penalty), optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation())
    got, _ = run(tx, params, batches)
    gradients = [joint_gradient(params, batch) for batch in batches]
    want = added(params, -0.1, jax.tree.map(lambda *each: sum(each) / 3, *gradients))
    assert_trees_close(got, want, 1e-6)  # gradients are accumulated in float32


def test_inside_multi_steps_the_last_batch_counts(promoting):
    params, batches = network(), [samples(seed=seed) for seed in range(3)]
    tx = optax.MultiSteps(optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1)), 3)
    got, state = run(tx, params, batches)
    gradients = [loss_gradient(params, batch) for batch in batches]
    mean = jax.tree.map(lambda *each: sum(each) / 3, *gradients)
    want = added(params, -0.1, added(mean, RATE, dense_gradient(params, batches[-1])))
    assert_trees_close(got, want, 1e-6)  # gradients are accumulated in float32
    np.testing.assert_allclose(kappa_of(state), dense_penalty(params, batches[-1]), rtol=1e-6)


def test_apply_if_finite_after_it_skips_a_batch_whose_kappa_is_nan(promoting):
    params, (x, labels) = network(), samples()
    tx = optax.chain(flat_reg(RATE, penalty), optax.apply_if_finite(optax.sgd(0.1), 5))
    grads = loss_gradient(params, (x, labels))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params, batch=(x.at[0, 0].set(jnp.nan), labels))
    assert_trees_close(updates, jax.tree.map(jnp.zeros_like, params))
    assert np.isnan(kappa_of(state))
    updates, state = tx.update(grads, state, params, batch=(x, labels))
    assert_trees_close(updates, jax.tree.map(lambda leaf: -0.1 * leaf, joint_gradient(params, (x, labels))))
    assert state[1].total_notfinite == 1


def test_inside_apply_if_finite(promoting):
    params, batch = network(), samples()
    tx = optax.apply_if_finite(optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1)), 5)
    got, state = run(tx, params, [batch])
    assert_trees_close(got, added(params, -0.1, joint_gradient(params, batch)))
    np.testing.assert_allclose(kappa_of(state), dense_penalty(params, batch), rtol=1e-6)


def test_inject_hyperparams_makes_the_strength_part_of_the_state():
    params, batch = network(), samples()
    tx = optax.inject_hyperparams(flat_reg, static_args=("penalty", "head", "metric", "axis_name"))(0.1, penalty)
    state = tx.init(params)
    state.hyperparams["strength"] = jnp.asarray(RATE)
    updates = some_updates(params)
    got, state = jax.jit(tx.update)(updates, state, params, batch=batch)
    assert_trees_close(got, added(updates, RATE, dense_gradient(params, batch)))
    np.testing.assert_allclose(kappa_of(state), dense_penalty(params, batch), rtol=1e-6)


def test_in_a_named_chain():
    params, batch = network(), samples()
    tx = optax.named_chain(("flat", flat_reg(RATE, penalty)), ("sgd", optax.sgd(0.1)))
    got, state = run(tx, params, [batch])
    assert_trees_close(got, added(params, -0.1, joint_gradient(params, batch)))
    np.testing.assert_allclose(state["flat"].kappa, dense_penalty(params, batch), rtol=1e-6)


def test_in_a_scan_and_with_donated_buffers():
    params = network()
    batches = jax.tree.map(lambda *each: jnp.stack(each), *[samples(seed=seed) for seed in range(3)])
    tx = optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state):
        def step(carry, batch):
            params, state = carry
            updates, state = tx.update(loss_gradient(params, batch), state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), kappa_of(state)

        return jax.lax.scan(step, (params, state), batches)

    (got, _), kappas = train(network(), tx.init(params))
    want = params
    for i in range(3):
        batch = jax.tree.map(lambda each, i=i: each[i], batches)
        np.testing.assert_allclose(kappas[i], dense_penalty(want, batch), rtol=1e-6)
        want = added(want, -0.1, joint_gradient(want, batch))
    assert_trees_close(got, want)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("by", ["penalty", "head"])
def test_in_a_shard_map_it_is_the_mean_over_the_devices(by, check_vma):
    params, batch = network(), samples(24)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = flat_reg(RATE, penalty if by == "penalty" else None, head="head" if by == "head" else None, axis_name="data")

    def step(params, batch):
        zeros = jax.tree.map(jnp.zeros_like, params)
        needed = {"batch": batch} if by == "penalty" else {"feats": features(params, batch[0]), "labels": batch[1]}
        updates, state = tx.update(zeros, tx.init(params), params, **needed)
        return updates, state.kappa

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=check_vma)
    got, kappa = jax.jit(sharded)(params, batch)
    gradient = dense_gradient(params, batch)
    if by == "head":
        gradient["body"] = jax.tree.map(jnp.zeros_like, gradient["body"])
    assert_trees_close(got, added(jax.tree.map(jnp.zeros_like, params), RATE, gradient), 1e-12)
    np.testing.assert_allclose(kappa, dense_penalty(params, batch), rtol=1e-6)


def test_a_penalty_that_is_averaged_over_the_devices_is_not_averaged_again():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def averaged(params, batch):
        return jax.lax.pmean(penalty(params, batch), "data")

    def step(penalty, axis_name, params, batch):
        tx = flat_reg(RATE, penalty, axis_name=axis_name)
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)[0]

    def sharded(penalty, axis_name):
        return jax.shard_map(
            functools.partial(step, penalty, axis_name), mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
        )

    params, batch = network(), samples(24)
    got = jax.jit(sharded(averaged, None))(params, batch)
    assert_trees_close(got, jax.tree.map(lambda leaf: RATE * leaf, dense_gradient(params, batch)))
    with pytest.raises(ValueError, match="leave axis_name out"):
        jax.jit(sharded(averaged, "data"))(params, batch)
    with pytest.raises(ValueError, match=r"differs along \['data'\].* give them as axis_name"):
        jax.jit(sharded(penalty, None))(params, batch)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_sharded_arrays_under_jit(axis_type):
    params, batch = network(), samples(24)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    everywhere = jax.device_put(params, NamedSharding(mesh, P()))
    tx = flat_reg(RATE, penalty)

    @jax.jit
    def step(params, batch):
        return tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)[0]

    got = step(everywhere, placed)
    assert_trees_close(got, jax.tree.map(lambda leaf: RATE * leaf, dense_gradient(params, batch)), 1e-12)


def test_bfloat16_updates_stay_bfloat16_and_are_rounded_once():
    params, batch = network(dtype=np.float32), samples(dtype=np.float32)
    updates = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), some_updates(params))
    tx = flat_reg(RATE, penalty)
    got, state = jax.jit(tx.update)(updates, tx.init(params), params, batch=batch)
    gradient = dense_gradient(params, batch)
    want = jax.tree.map(lambda u, g: (u.astype(jnp.float32) + RATE * g).astype(jnp.bfloat16), updates, gradient)
    chex.assert_trees_all_equal_dtypes(got, updates)
    chex.assert_trees_all_close(got, want, rtol=2**-8)
    assert state.kappa.dtype == jnp.float32


def test_in_bfloat16_parameters_the_gradient_is_that_of_the_rounded_ones():
    params, batch = network(dtype=jnp.bfloat16), samples(dtype=np.float32)

    def penalty(params, batch):
        return relative_flatness(
            params["head"], features(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch[0]), batch[1]
        )

    tx = flat_reg(1.0, penalty)
    got, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=batch)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    want = dense_gradient(wide, (batch[0].astype(jnp.float64), batch[1]))
    chex.assert_trees_all_equal_dtypes(got, params)
    assert_trees_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), got), want, 1e-2)


# What it does not work in, and says so.


def fed(tx, params, **needed):
    return tx.update(some_updates(params), tx.init(params), params, **needed)


def test_masked_and_partition_hide_parameters_from_a_penalty():
    params, batch = network(), samples()
    masked = optax.masked(flat_reg(RATE, penalty), {"body": False, "head": True})
    parts = optax.partition(
        {"flat": flat_reg(RATE, penalty), "plain": optax.sgd(0.1)}, {"body": "plain", "head": "flat"}
    )
    for tx in (masked, parts):
        with pytest.raises(ValueError, match=r"inside optax\.masked or optax\.partition.* put it before them"):
            fed(tx, params, batch=batch)
    outside = optax.chain(flat_reg(RATE, penalty), optax.masked(optax.set_to_zero(), {"body": True, "head": False}))
    got, _ = fed(outside, params, batch=batch)
    assert_trees_close(got["head"], added(some_updates(params), RATE, dense_gradient(params, batch))["head"])


def test_masked_leaves_a_head_that_it_does_not_hide():
    params, (x, labels) = network(), samples()
    feats = features(params, x)
    tx = optax.masked(flat_reg(RATE, head="head"), {"body": False, "head": True})
    got, _ = fed(tx, params, feats=feats, labels=labels)
    want = added(some_updates(params)["head"], RATE, dense_head_gradient(params["head"], feats, labels))
    assert_trees_close(got, some_updates(params) | {"head": want})
    with pytest.raises(ValueError, match=r"inside optax\.masked or optax\.partition"):
        fed(
            optax.masked(flat_reg(RATE, head="head"), {"body": True, "head": False}), params, feats=feats, labels=labels
        )


@pytest.mark.parametrize(
    "mask", [{"body": True, "head": False}, {"body": True, "head": {"kernel": True, "bias": False}}]
)
def test_a_head_of_which_a_part_is_masked_is_an_error(mask):
    params, (x, labels) = network(), samples()
    with pytest.raises(ValueError, match=r"inside optax\.masked or optax\.partition"):
        fed(optax.masked(flat_reg(RATE, head="head"), mask), params, feats=features(params, x), labels=labels)


def test_flatten_and_lookahead_are_named_when_they_are_set_up():
    with pytest.raises(ValueError, match=r"flat_reg is inside optax\.flatten.* put it before"):
        optax.flatten(optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1))).init(network())
    with pytest.raises(ValueError, match=r"flat_reg is inside optax\.lookahead"):
        optax.lookahead(optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1)), 5, 0.5).init(
            optax.LookaheadParams.init_synced(network())
        )


def test_lookahead_after_it_works(promoting):
    params, batch = network(), samples()
    flat, fast = flat_reg(RATE, penalty), optax.lookahead(optax.sgd(0.1), 5, 0.5)
    pair = optax.LookaheadParams.init_synced(params)
    grads, _ = flat.update(loss_gradient(params, batch), flat.init(params), pair.fast, batch=batch)
    updates, _ = fast.update(grads, fast.init(pair), pair)
    assert_trees_close(optax.apply_updates(pair, updates).fast, added(params, -0.1, joint_gradient(params, batch)))


def test_arguments_lost_in_multi_steps_are_an_error_that_names_it():
    params = network()
    inner = optax.MultiSteps(optax.chain(flat_reg(RATE, penalty), optax.sgd(0.1)), 2).gradient_transformation()
    with pytest.raises(TypeError, match=r"got no batch: .*inside optax\.MultiSteps: give its update"):
        fed(optax.chain(inner), params, batch=samples())


@pytest.mark.parametrize(
    ("error", "message", "tx", "needed"),
    [
        (TypeError, r"got no batch: call tx.update\(grads, state, params, batch=batch\)", flat_reg(1.0, penalty), {}),
        (TypeError, r"got no batch: .*optimizer.update\(model, grads, batch=batch\)", flat_reg(1.0, penalty), {}),
        (TypeError, r"got no feats and no labels", flat_reg(1.0, head="head"), {}),
        (TypeError, r"got no labels", flat_reg(1.0, head="head"), {"feats": 1.0}),
        (ValueError, r"head='body/head'.* one of \['body', 'head'\]", flat_reg(1.0, head="body/head"), "head"),
        (ValueError, r"finds no linear head in params: give head=", flat_reg(1.0), "head"),
        (
            TypeError,
            r"penalty returned float64\(12,\), wanted a scalar",
            flat_reg(1.0, lambda p, b: b[0][:, 0]),
            "batch",
        ),
        (TypeError, r"penalty returned tuple, wanted a scalar", flat_reg(1.0, lambda p, b: (1.0, 2.0)), "batch"),
    ],
)
def test_what_is_missing_is_said(error, message, tx, needed):
    batch = samples()
    given = {"head": {"feats": features(network(), batch[0]), "labels": batch[1]}, "batch": {"batch": batch}}
    with pytest.raises(error, match=message):
        fed(tx, network(), **(given[needed] if isinstance(needed, str) else needed))


def test_a_head_besides_a_penalty_and_a_strength_of_many_numbers_are_errors():
    for options in ({"head": "head"}, {"metric": simplified_relative_flatness}):
        with pytest.raises(ValueError, match="wanted one or the other"):
            flat_reg(1.0, penalty, **options)
    for strength in (jnp.ones(2), 1j):
        with pytest.raises(ValueError, match="wanted a real number or a schedule"):
            flat_reg(strength, penalty)
