"""One of two processes of two devices each, started by test_sharding.py: `two_processes.py PORT PROCESS_ID`."""

import functools
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatjax

V, M, N, TILE = 64, 5, 12, 12


def main(port, process_id):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process_id)
    assert (jax.process_count(), len(jax.devices())) == (2, 4)

    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(M, V)), "bias": rng.normal(size=V)}
    labels = rng.integers(0, V, N)
    labels[:6] = -100  # All that the first process has, where the samples are split between the two.
    arguments = (head, rng.normal(size=(N, M))), labels, rng.uniform(0.1, 2, N)

    def objective(point, labels, weights, axis_name=None):
        options = {"weights": weights, "tile_size": TILE, "axis_name": axis_name}
        loss, kappa = flatjax.cross_entropy_and_flatness(*point, labels, **options)
        return loss - 0.3 * kappa, kappa

    compute = jax.value_and_grad(objective, has_aux=True)
    with jax.default_device(jax.local_devices()[0]):
        want = jax.tree.map(np.asarray, jax.jit(compute)(*arguments))

    def assert_shards_are_of(got, want):
        for shard in got.addressable_shards:
            np.testing.assert_allclose(shard.data, want[shard.index], rtol=1e-12, atol=1e-12 * np.max(np.abs(want)))

    samples, whole = PartitionSpec("data"), PartitionSpec()
    point = {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")}, samples
    specs = point, samples, samples
    manual = jax.value_and_grad(functools.partial(objective, axis_name=("model", "data")), has_aux=True)
    # The axis that comes first is split between the processes, the other between the devices of each.
    for axes in (("model", "data"), ("data", "model")):
        mesh = jax.make_mesh((2, 2), axes, axis_types=(AxisType.Auto,) * 2)
        by_device = jax.shard_map(manual, mesh=mesh, in_specs=specs, out_specs=((whole, whole), point))
        program = jax.jit(compute if axes[0] == "model" else by_device)
        shardings = jax.tree.map(functools.partial(NamedSharding, mesh), specs)
        put = jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, x.__getitem__), arguments, shardings)
        jax.tree.map(assert_shards_are_of, program(*put), want)
    sys.stdout.write("ok\n")  # at once, where print may let the other process in between a line and its end


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
