"""What is done to kernels has the size asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.llm_placement.perturbations import rounded, with_noise

RNG = np.random.default_rng(0)
PARAMS = {
    "token_embedding": {"embedding": jnp.asarray(RNG.normal(size=(50, 40)))},
    "blocks": {0: {"up": {"kernel": jnp.asarray(RNG.normal(size=(40, 60))), "bias": jnp.ones(60)}}},
    "norm": {"scale": jnp.ones(40)},
}


def of(params):
    return params["token_embedding"]["embedding"], params["blocks"][0]["up"]["kernel"]


def test_noise_has_the_norm_asked_for_on_every_kernel_and_leaves_other_parameters():
    noisy = with_noise(PARAMS, jax.random.key(0), jnp.float64(0.2))
    for kernel, changed in zip(of(PARAMS), of(noisy), strict=True):
        ratio = np.linalg.norm(changed - kernel) / np.linalg.norm(kernel)
        assert abs(ratio - 0.2) < 0.2 * 4 / np.sqrt(2 * kernel.size)
    assert noisy["blocks"][0]["up"]["bias"] is PARAMS["blocks"][0]["up"]["bias"]
    assert noisy["norm"]["scale"] is PARAMS["norm"]["scale"]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_leaves_each_output_a_symmetric_grid_with_its_largest_weight_on_it(bits):
    levels = 2 ** (bits - 1) - 1
    for kernel, changed, axis in zip(of(PARAMS), of(rounded(PARAMS, bits)), (1, 0), strict=True):
        largest = np.max(np.abs(kernel), axis=axis, keepdims=True)
        multiples = changed / (largest / levels)
        np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-9)
        np.testing.assert_allclose(np.max(np.abs(multiples), axis=axis), levels)
        assert np.max(np.abs(changed - kernel) / (largest / levels)) <= 0.5 + 1e-9
        assert np.max(np.abs(changed - kernel)) > 0


def test_an_output_of_zeros_stays():
    params = {"kernel": jnp.array([[0.0, 1.0], [0.0, -3.0]])}
    np.testing.assert_array_equal(rounded({"head": params}, 4)["head"]["kernel"][:, 0], 0)
