"""Convolutions by products are convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harness.training.convolutions import convolve


@pytest.mark.parametrize(("size", "stride", "side"), [(3, 1, 8), (3, 2, 8), (3, 2, 5), (1, 2, 4)])
def test_a_convolution_by_products_is_the_convolution(size, stride, side):
    rng = np.random.default_rng(0)
    images, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(size, size, 3, 4))
    padding, layout = [(size // 2, size // 2)] * 2, ("NHWC", "HWIO", "NHWC")
    wanted = jax.lax.conv_general_dilated(images, kernel, (stride, stride), padding, dimension_numbers=layout)
    got = convolve(jnp.asarray(images), jnp.asarray(kernel), (stride, stride), padding)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)
