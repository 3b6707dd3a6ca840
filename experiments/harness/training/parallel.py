"""Train several small networks at a time, split among the devices: on two cores this takes half the time."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Parallel:
    """The devices share several networks, and each has as many as the others.

    Args:
        at_most: the number of networks, where there may be fewer than devices; by default every device is used.
    """

    def __init__(self, at_most: int | None = None):
        self.size = jax.device_count() if at_most is None else min(jax.device_count(), at_most)
        self._mesh = jax.make_mesh((self.size,), ("network",), axis_types=(AxisType.Auto,))

    def stack(self, trees: Sequence[Any]) -> Any:
        """Stack trees of one structure, as many per device; the first stands again where there would be none."""
        all_of_them = [*trees, *[trees[0]] * (-len(trees) % self.size)]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *all_of_them)
        return jax.device_put(stacked, NamedSharding(self._mesh, PartitionSpec("network")))

    def map(self, function: Callable[..., Any], num_split: int) -> Callable[..., Any]:
        """Compile a function of one network for several, whose first arguments are stacked and whose others are common.

        Args:
            function: function of one network.
            num_split: how many of its arguments are stacked.
        """

        def on_a_device(split: Any, common: Any) -> Any:
            def of_one(each: Any) -> Any:
                return function(*each, *common)

            if jax.tree.leaves(split)[0].shape[0] == 1:
                results = of_one(jax.tree.map(lambda leaf: leaf[0], split))
                return jax.tree.map(lambda leaf: leaf[None], results)
            # On a CPU batched products of small matrices are slower than one after the other.
            return jax.lax.map(of_one, split) if jax.default_backend() == "cpu" else jax.vmap(of_one)(split)

        specs = PartitionSpec("network"), PartitionSpec()
        on_devices = jax.shard_map(on_a_device, mesh=self._mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
        return jax.jit(lambda *arguments: on_devices(arguments[:num_split], arguments[num_split:]))
