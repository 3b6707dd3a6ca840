"""What the package is measured against is what it says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_problem

import benchmark_head
import flatjax
from harness.benchmarks.baselines import cross_entropy, tiled_cross_entropy, weight_by_weight

value_and_gradient = jax.jit(benchmark_head.value_and_gradient(cross_entropy))


@pytest.mark.parametrize("tile_size", [1, 5, 36, 37])
def test_the_tiled_loss_is_the_loss_and_has_its_gradient(tile_size):
    batch = benchmark_head.random_batch(37, 5, 11, seed=0)
    got = jax.jit(benchmark_head.value_and_gradient(partial(tiled_cross_entropy, tile_size=tile_size)))(*batch)
    want = value_and_gradient(*batch)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-13)


def test_the_published_algorithm_gives_kappa():
    problem = random_problem(3, 4, (7,))
    params, feats, labels = jax.tree.map(jnp.asarray, (problem.params, problem.feats, problem.labels))
    want = flatjax.relative_flatness(params, feats, labels)
    np.testing.assert_allclose(jax.jit(weight_by_weight)(params, feats, labels), want, rtol=1e-12)
