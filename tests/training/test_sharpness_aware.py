"""SAM and ASAM against steps written out in NumPy, alone and in everything that an optimizer can be put into."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flatjax.training import sharpness_aware

ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
A = np.diag([1.0, 2.0, 0.5, 3.0, 1.5]) + 0.1
CENTRES = np.random.default_rng(1).normal(size=(8, 5))


def start():
    """Five weights in two leaves, one of them 0."""
    return {"kernel": jnp.array([[0.7, -1.2], [0.0, 2.0]]), "bias": jnp.array([0.4])}


def flat(params):
    return jnp.concatenate([params["kernel"].reshape(-1), params["bias"]])


def loss(params, centres):
    """½ (w − c)ᵀA(w − c), of which the gradient is A(w − c)."""
    difference = flat(params)[None] - centres
    return jnp.mean(jnp.einsum("ni,ij,nj->n", difference, A, difference)) / 2


def numpy_ascent(w, g, radius, adaptive):
    """As the papers write it."""
    if adaptive:
        return radius * w**2 * g / np.linalg.norm(np.abs(w) * g)
    return radius * g / np.linalg.norm(g)


def numpy_steps(radii, adaptive=False, learning_rate=0.1, momentum=0.9, centres=CENTRES):
    """Gradient descent with momentum, of one radius a step."""
    w, trace, centre = np.asarray(flat(start())), np.zeros(5), centres.mean(axis=0)
    for radius in radii:
        uphill = w + numpy_ascent(w, A @ (w - centre), radius, adaptive)
        trace = A @ (uphill - centre) + momentum * trace
        w = w - learning_rate * trace
    return w


def schedule(count):
    return 0.4 - 0.1 * count.astype(float)


def optimizer(radius=0.3, adaptive=False, **options):
    return sharpness_aware(optax.sgd(0.1, momentum=0.9), radius, adaptive=adaptive, **options)


def step(tx, params, state, centres, **extra_args):
    grads = jax.grad(loss)(params, centres)
    updates, state = tx.update(grads, state, params, grad_fn=lambda p, _: jax.grad(loss)(p, centres), **extra_args)
    return optax.apply_updates(params, updates), state


def compiled(tx):
    """A step as one program: operation by operation it takes several times as long."""
    return jax.jit(functools.partial(step, tx))


def run(tx, num_steps, step=None, **extra_args):
    params, state = start(), tx.init(start())
    step = compiled(tx) if step is None else functools.partial(step, tx)
    for _ in range(num_steps):
        params, state = step(params, state, CENTRES, **extra_args)
    return flat(params)


def ascent(grads, params, radius=0.5, adaptive=False):
    """ε alone: the second "gradient" is how far uphill it is taken."""
    tx = sharpness_aware(optax.identity(), radius, adaptive=adaptive)

    def offset(uphill, _):
        return jax.tree.map(jnp.subtract, uphill, params)

    return tx.update(grads, tx.init(params), params, grad_fn=offset)[0]


compiled_ascent = jax.jit(ascent, static_argnames=("radius", "adaptive"))


@ADAPTIVE
def test_steps_are_those_written_out_by_hand(adaptive):
    np.testing.assert_allclose(run(optimizer(adaptive=adaptive), 5), numpy_steps([0.3] * 5, adaptive), rtol=1e-12)


@jax.numpy_dtype_promotion("standard")  # which Adam needs
def test_without_a_radius_it_is_the_optimizer():
    params, state, tx = start(), optax.adam(0.1).init(start()), optax.adam(0.1)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(params, CENTRES), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(run(sharpness_aware(optax.adam(0.1), 0.0), 3), flat(params), rtol=1e-13)


@ADAPTIVE
def test_the_radius_follows_its_schedule(adaptive):
    want = numpy_steps([0.4, 0.3, 0.2, 0.1, 0.0], adaptive)
    np.testing.assert_allclose(run(optimizer(schedule, adaptive), 5), want, rtol=1e-12)


def test_the_adaptive_ascent_does_not_change_with_a_rescaling_of_the_weights():
    scales = np.array([0.1, 3.0, 7.0])
    w, g = np.array([1.0, -2.0, 0.5]), np.array([0.3, 0.2, -0.7])
    plain, rescaled = (compiled_ascent(jnp.array(g / s), jnp.array(w * s), adaptive=True) for s in (np.ones(3), scales))
    np.testing.assert_allclose(rescaled, scales * plain, rtol=1e-13)


@ADAPTIVE
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_at_a_gradient_of_zero_nothing_is_climbed(adaptive, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), start())
    for leaf in jax.tree.leaves(compiled_ascent(jax.tree.map(jnp.zeros_like, params), params, adaptive=adaptive)):
        assert leaf.dtype == dtype
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_weights_of_zero_are_not_climbed_by_asam_though_their_gradient_is_not_zero():
    np.testing.assert_array_equal(compiled_ascent(jnp.ones(3), jnp.zeros(3), adaptive=True), np.zeros(3))


# The squares of the largest overflow, of the smallest underflow; and at 3e38 so does the norm itself.
@ADAPTIVE
@pytest.mark.parametrize("size", [3e38, 1e30, 1.0, 1e-30, 2e-38])
@pytest.mark.parametrize("weight_size", [1e-12, 1.0])
def test_a_gradient_of_any_size_is_climbed_in_float32(adaptive, size, weight_size):
    rng = np.random.default_rng(0)
    g = {"a": np.float32(size * rng.uniform(0.7, 1, (3, 2)) * rng.choice([-1, 1], (3, 2))), "b": np.float32([size, 0])}
    # Without a weight of its own, ε is what is climbed to the last bit; ASAM needs weights.
    w = jax.tree.map(lambda x: np.float32(adaptive * weight_size * rng.uniform(1, 2, x.shape)), g)
    got = compiled_ascent(jax.tree.map(jnp.asarray, g), jax.tree.map(jnp.asarray, w), 0.5 * weight_size, adaptive)
    wide_w, wide_g = (np.concatenate([np.float64(x["a"].reshape(-1)), np.float64(x["b"])]) for x in (w, g))
    want = numpy_ascent(wide_w, wide_g, 0.5 * weight_size, adaptive)
    atol = np.spacing(np.float32(4 * weight_size)) if adaptive else 0
    np.testing.assert_allclose(np.concatenate([got["a"].reshape(-1), got["b"]]), want, rtol=1e-6, atol=atol)


@ADAPTIVE
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_stays_so(adaptive, bad):
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    got = compiled_ascent({"a": jnp.array([1.0, bad]), "b": jnp.array([1.0])}, params, adaptive=adaptive)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(got))


@ADAPTIVE
def test_norms_of_bfloat16_are_summed_in_float32(adaptive):
    """In bfloat16 a sum of 70,000 ones is 256."""
    params = {"a": jnp.full(70_000, 1e-3, jnp.bfloat16), "b": jnp.zeros((1,), jnp.float32)}
    grads = {"a": jnp.ones(70_000, jnp.bfloat16), "b": jnp.zeros((1,), jnp.float32)}
    radius = 70_000**0.5 * (1.0 if adaptive else 1e-3)
    got = compiled_ascent(grads, params, radius, adaptive)["a"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(float), np.full(70_000, 1e-3), rtol=0.02)


def test_gradients_in_bfloat16_of_weights_in_float32_are_climbed_in_float32():
    g, w = np.float32([1.0, -3.0, 0.5]), np.float32([0.3, 0.2, 0.1])
    got = compiled_ascent(jnp.asarray(g, jnp.bfloat16), jnp.asarray(w))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, numpy_ascent(w, g, 0.5, False), atol=1e-7)


def test_compiled_scanned_and_with_donated_buffers_it_is_the_same():
    tx, want = optimizer(schedule), numpy_steps([0.4, 0.3, 0.2, 0.1])
    donating = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))

    def donated_step(_, params, state, centres):
        params = jax.tree.map(jnp.copy, params)
        results = donating(params, state, jnp.asarray(centres))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state.opt_state)))
        return results

    np.testing.assert_allclose(run(tx, 4, donated_step), want, rtol=1e-12)
    scan = jax.jit(lambda c: jax.lax.scan(lambda carry, x: (step(tx, *carry, x), None), (start(), tx.init(start())), c))
    (params, _), _ = scan(jnp.broadcast_to(CENTRES, (4, *CENTRES.shape)))
    np.testing.assert_allclose(flat(params), want, rtol=1e-12)


def test_radii_may_be_traced():
    got = jax.jit(jax.vmap(lambda radius: run(optimizer(radius), 2)))(jnp.array([0.1, 0.3], jnp.float32))
    np.testing.assert_allclose(got, [numpy_steps([np.float32(r)] * 2) for r in (0.1, 0.3)], rtol=1e-12)


def needing(name):
    """Subtracts an extra argument that it cannot do without."""

    def update(updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u: u - extra_args[name], updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_extra_arguments_reach_the_optimizer_inside_and_the_chain_around():
    inner = optax.chain(needing("batch"), optax.sgd(0.1, momentum=0.9))
    inside = optax.chain(sharpness_aware(inner, 0.3), needing("other"))
    want = run(optax.chain(optimizer(), optax.identity()), 1) + 0.1 * 2.0 - 5.0
    np.testing.assert_allclose(run(inside, 1, batch=2.0, other=5.0), want, rtol=1e-12)
    named = optax.named_chain(("sam", optimizer()), ("other", needing("other")))
    np.testing.assert_allclose(run(named, 1, batch=2.0, other=5.0), want - 0.2, rtol=1e-12)


def test_what_stands_before_it_changes_the_ascent_alone():
    got = run(optax.chain(optax.scale(-1.0), optimizer()), 1)
    np.testing.assert_allclose(got, numpy_steps([-0.3]), rtol=1e-12)


def test_it_works_in_the_wrappers_that_pass_extra_arguments_on():
    want = numpy_steps([0.3] * 3)
    np.testing.assert_allclose(run(optax.apply_if_finite(optimizer(), 2), 3), want, rtol=1e-12)
    injected = optax.inject_hyperparams(sharpness_aware)(optax.sgd(0.1, momentum=0.9), radius=0.3)
    assert injected.init(start()).hyperparams["radius"] == 0.3
    np.testing.assert_allclose(run(injected, 3), want, rtol=1e-12)
    np.testing.assert_allclose(run(optax.with_extra_args_support(optimizer()), 3), want, rtol=1e-12)


@jax.numpy_dtype_promotion("standard")  # which MultiSteps needs
def test_of_several_small_batches_all_give_the_ascent_and_the_last_the_descent():
    tx = optax.MultiSteps(sharpness_aware(optax.sgd(0.1), 0.3), 2, accumulator_dtype=jnp.float64)
    params, state = start(), tx.init(start())
    small_step = compiled(tx)
    for centres in (CENTRES[:4], CENTRES[4:]):
        params, state = small_step(params, state, centres)
    w = np.asarray(flat(start()))
    uphill = w + numpy_ascent(w, A @ (w - CENTRES.mean(axis=0)), 0.3, False)
    np.testing.assert_allclose(flat(params), w - 0.1 * A @ (uphill - CENTRES[4:].mean(axis=0)), rtol=1e-12)


def test_it_trains_an_nnx_model():
    model = nnx.Linear(2, 1, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    w = np.concatenate([np.asarray(model.kernel[...]).reshape(-1), np.asarray(model.bias[...])])
    optimizer = nnx.Optimizer(model, sharpness_aware(optax.sgd(0.1), 0.3), wrt=nnx.Param)
    inputs, targets = np.random.default_rng(0).normal(size=(6, 2)), np.arange(6.0)[:, None]

    def squared_error(model, inputs, targets):
        return jnp.mean((model(inputs) - targets) ** 2)

    @nnx.jit
    def train_step(model, optimizer, inputs, targets):
        graphdef, _, rest = nnx.split(model, nnx.Param, ...)

        def grad_fn(params, _):
            return jax.grad(lambda params: squared_error(nnx.merge(graphdef, params, rest), inputs, targets))(params)

        grads = nnx.grad(squared_error)(model, inputs, targets)
        optimizer.update(model, grads, grad_fn=grad_fn)

    for _ in range(2):
        train_step(model, optimizer, jnp.asarray(inputs), jnp.asarray(targets))

    design = np.hstack([inputs, np.ones((6, 1))])

    def gradient(w):
        return 2 * design.T @ (design @ w - targets[:, 0]) / 6

    for _ in range(2):
        w = w - 0.1 * gradient(w + numpy_ascent(w, gradient(w), 0.3, False))
    np.testing.assert_allclose(np.concatenate([model.kernel[...].reshape(-1), model.bias[...]]), w, rtol=1e-12)


@ADAPTIVE
@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_with_samples_of_their_own_take_the_step_of_all(adaptive, check_vma):
    tx, mesh = (
        optimizer(adaptive=adaptive, axis_name="data"),
        jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
    )

    def device_step(params, state, centres):
        def mean_gradient(params):
            varying = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params) if check_vma else params
            return jax.lax.pmean(jax.grad(loss)(varying, centres), "data")

        updates, state = tx.update(
            mean_gradient(params), state, params, grad_fn=lambda p, _: jax.grad(loss)(p, centres)
        )
        return optax.apply_updates(params, updates), state

    specs = {"in_specs": (PartitionSpec(), PartitionSpec(), PartitionSpec("data")), "out_specs": PartitionSpec()}
    sharded_step = jax.jit(jax.shard_map(device_step, mesh=mesh, check_vma=check_vma, **specs))
    params, state = start(), tx.init(start())
    for _ in range(3):
        params, state = sharded_step(params, state, CENTRES)
    np.testing.assert_allclose(flat(params), numpy_steps([0.3] * 3, adaptive), rtol=1e-12)


def test_devices_whose_gradients_were_not_averaged_climb_by_themselves():
    tx = sharpness_aware(optax.sgd(0.1), 0.3, axis_name="data")

    def device_step(centre):
        return step(tx, start(), tx.init(start()), centre[None])[0]

    got = jax.jit(jax.vmap(device_step, axis_name="data"))(CENTRES)
    w = np.asarray(flat(start()))
    uphill = [w + numpy_ascent(w, A @ (w - centre), 0.3, False) for centre in CENTRES]
    want = w - 0.1 * np.mean([A @ (x - centre) for x, centre in zip(uphill, CENTRES, strict=True)], axis=0)
    for params in (jax.tree.map(lambda x, i=i: np.asarray(x)[i], got) for i in range(8)):
        np.testing.assert_allclose(np.append(params["kernel"], params["bias"]), want, rtol=1e-12)


@ADAPTIVE
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_parameters_split_among_devices_stay_there(adaptive, axis_type):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    rng = np.random.default_rng(0)
    w, g, curvatures = (rng.normal(size=(16, 3)) for _ in range(3))
    tx = sharpness_aware(optax.sgd(1.0), 0.5, adaptive=adaptive)

    @jax.jit
    def update(w, g, curvatures):
        return tx.update(g, tx.init(w), w, grad_fn=lambda p, _: curvatures * p)[0]

    arrays = [jax.device_put(x, sharding) for x in (w, g, curvatures)]
    compiled = update.lower(*arrays).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(*arrays)
    assert got.sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_allclose(got, -curvatures * (w + numpy_ascent(w, g, 0.5, adaptive)), rtol=1e-12)


def test_a_gradient_that_is_not_like_the_parameters_is_an_error():
    w = jnp.asarray([3.0, 4.0])
    tx = sharpness_aware(optax.sgd(0.1), radius=0.5)
    with pytest.raises(TypeError, match=r"wanted a gradient like the parameters"):
        tx.update(w, tx.init(w), w, grad_fn=lambda w, _: jax.value_and_grad(lambda w: jnp.sum(w**2))(w))
