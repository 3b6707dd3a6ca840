"""Parameters split among devices: what one device gives, and nothing gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flatjax.curvature.density import spectral_density
from flatjax.curvature.lanczos import extreme_eigenpairs
from flatjax.curvature.products import GaussNewton, Hessian
from flatjax.curvature.streams import Streamed
from flatjax.curvature.traces import diagonal, trace
from flatjax.curvature.vectors import rademacher_like

from . import cases

KEY = jax.random.key(0)
WIDTHS = (3, 16, 5)
KERNELS = ("head/kernel", "hidden/kernel")
SPECS = {"hidden": {"kernel": P(None, "model"), "bias": P("model")}, "head": {"kernel": P("model"), "bias": P()}}


def mesh_of(axis_type):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def predict(params, x, y):
    """That of the cases, with a sum over split features said to be over devices where axes are explicit."""
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    mesh = jax.typeof(params["hidden"]["kernel"]).sharding.mesh
    summed = NamedSharding(mesh, P("data")) if mesh.explicit_axes else None
    return jnp.matmul(hidden, params["head"]["kernel"], out_sharding=summed) + params["head"]["bias"][None]


def mean_loss(z, x, y):
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - jnp.sum(y * z, axis=1))


def loss_fn(params, x, y):
    return mean_loss(predict(params, x, y), x, y)


def problem(axis_type=None):
    """On one device without an axis type."""
    params, (x, y) = cases.mlp_params(WIDTHS), cases.samples(8, WIDTHS)
    batch = x, np.eye(WIDTHS[-1])[y]
    if axis_type is None:
        return params, batch
    mesh = mesh_of(axis_type)
    place = functools.partial(NamedSharding, mesh)
    return jax.device_put(params, jax.tree.map(place, SPECS)), jax.device_put(batch, place(P("data")))


def curvatures(params, batch):
    return {
        "hessian": Hessian(loss_fn, params, batch),
        "leaves": Hessian(loss_fn, params, batch, KERNELS),
        "gauss newton": GaussNewton(predict, mean_loss, params, batch),
    }


def in_batches(params, batch, leaves):
    """Twice the same batch: the curvature is that of one."""
    return Streamed(lambda *batch: Hessian(loss_fn, params, batch, leaves), [batch, batch])


MEASURES = {
    "trace": lambda curvature: trace(curvature, KEY, num_probes=3, chunk_size=2),
    "xtrace": lambda curvature: trace(curvature, KEY, num_probes=3, method="xtrace"),
    "diagonal": lambda curvature: diagonal(curvature, KEY, num_probes=4, chunk_size=2),
    "eigenpairs": lambda curvature: extreme_eigenpairs(curvature, KEY, num_pairs=1, num_steps=6),
    "density": lambda curvature: spectral_density(
        curvature, KEY, num_probes=2, num_steps=4, num_points=64, broadening=1.0
    ),
}


@functools.cache
def on_one_device(measure, name):
    return MEASURES[measure](curvatures(*problem())[name])


def assert_same(got, want):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, want)


# A normal draw for each leaf is most of a program: what makes the most of them has two leaves, not four.
COMPILED = [
    *((measure, "hessian") for measure in ("trace", "diagonal", "eigenpairs")),
    *((measure, "leaves") for measure in ("xtrace", "density")),
    ("trace", "gauss newton"),
]
STREAMED = [("trace", "hessian"), ("xtrace", "leaves"), ("diagonal", "hessian"), ("eigenpairs", "leaves")]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("measure", "name"), COMPILED)
def test_eight_devices_give_what_one_gives_and_gather_nothing(measure, name, axis_type):
    curvature = curvatures(*problem(axis_type))[name]
    compiled = jax.jit(MEASURES[measure]).lower(curvature).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text
    # Of a kernel (3, 16) or (16, 5), and so of a stack of them, no device has more than a fourth.
    assert not re.search(r"f64\[(\d+,)?(3,16|16,5)\]", text)
    got = compiled(curvature)
    assert_same(got, on_one_device(measure, name))
    if measure == "eigenpairs":
        shards = got.eigenvectors["hidden"]["kernel"].addressable_shards
        assert {shard.data.shape for shard in shards} == {(1, 3, 4)}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(("measure", "name"), STREAMED)
def test_batches_on_eight_devices_give_what_one_gives(measure, name, axis_type):
    curvature = in_batches(*problem(axis_type), KERNELS if name == "leaves" else None)
    assert_same(MEASURES[measure](curvature), on_one_device(measure, name))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_draws_are_split_like_the_leaves_and_the_same_on_any_number_of_devices(axis_type):
    params, _ = problem(axis_type)
    got = jax.jit(rademacher_like, keep_unused=True)(params, KEY)
    want = jax.jit(rademacher_like)(problem()[0], KEY)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    if axis_type == AxisType.Explicit:
        assert got["hidden"]["kernel"].sharding.spec == SPECS["hidden"]["kernel"]
