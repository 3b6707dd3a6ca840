"""Run a function on several trials, one on each device: small networks train so in half the time on two cores."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh_of_trials() -> Mesh:
    """Return the mesh of all devices."""
    return jax.make_mesh((jax.device_count(),), ("trial",), axis_types=(AxisType.Auto,))


def stacked(mesh: Mesh, trials: list[Any]) -> Any:
    """Stack trees of one structure, one per device; the first stands again where there is none."""
    all_of_them = trials + trials[:1] * (mesh.size - len(trials))
    several = jax.tree.map(lambda *leaves: np.stack(leaves), *all_of_them)
    return jax.device_put(several, NamedSharding(mesh, PartitionSpec("trial")))


def of_several(function: Callable[..., Any], mesh: Mesh, num_split: int) -> Callable[..., Any]:
    """Split the first arguments' axis of trials among the devices; all devices have the other arguments."""

    @jax.jit
    def several(*arguments: Any) -> Any:
        split, common = arguments[:num_split], arguments[num_split:]

        def on_a_device(split: Any, common: Any) -> Any:
            # One network alone: many together, by vmap, were no faster.
            results = function(*jax.tree.map(lambda leaf: leaf[0], split), *common)
            return jax.tree.map(lambda leaf: leaf[None], results)

        specs = PartitionSpec("trial"), PartitionSpec()
        on_devices = jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
        return on_devices(split, common)

    return several
