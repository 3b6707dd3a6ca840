"""Networks that benchmarks measure."""

import jax
import pytest

from harness.benchmarks.networks import perceptron


@pytest.fixture(autouse=True)
def _as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


def test_networks_learn_their_task():
    network = perceptron(batch_size=64, width=16)
    before, after = (
        float(each.loss_fn(each.params, *each.batches[0])) for each in (network, network.trained(50, 1e-2))
    )
    assert after < before / 2
