"""Networks that benchmarks measure."""

from harness.benchmarks.networks import perceptron


def test_networks_learn_their_task():
    network = perceptron(batch_size=64, width=16)
    before, after = (
        float(each.loss_fn(each.params, *each.batches[0])) for each in (network, network.trained(50, 1e-2))
    )
    assert after < before / 2
