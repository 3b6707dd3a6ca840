"""Memory is that of intermediate results."""

import jax.numpy as jnp

import benchmark_head
from harness.benchmarks.baselines import cross_entropy


def test_temporary_memory_of_a_product_is_that_of_its_intermediate_results():
    batch = {"kernel": jnp.ones((3, 1000)), "bias": jnp.zeros(1000)}, jnp.ones((500, 3)), jnp.zeros(500, int)
    assert benchmark_head.temporary_memory(cross_entropy, batch) >= 500 * 1000 * 8
