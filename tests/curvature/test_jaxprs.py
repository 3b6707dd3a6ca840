"""A program taken apart is the program, and the order of a convolution's axes changes nothing but its speed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.curvature.jaxprs import as_function, with_convolutions_in_order
from flatjax.curvature.products import Hessian, product

CONVOLUTIONS = {
    "one axis": ((2, 7, 3), (3, 3, 4), ("NWC", "WIO", "NWC"), {}),
    "two axes": ((2, 6, 5, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"window_strides": (2, 1)}),
    "features first": ((2, 3, 6, 5), (4, 3, 3, 2), ("NCHW", "OIHW", "NCHW"), {"rhs_dilation": (2, 1)}),
    "features first, result last": ((3, 6, 2, 5), (3, 4, 3, 2), ("CHNW", "HOIW", "WHCN"), {"lhs_dilation": (1, 2)}),
    "three axes": ((2, 4, 5, 3, 2), (2, 3, 2, 2, 3), ("NDHWC", "DHWIO", "NDHWC"), {}),
    "groups": ((2, 6, 5, 4), (3, 2, 2, 6), ("NHWC", "HWIO", "NHWC"), {"feature_group_count": 2}),
    "groups of the batch": ((4, 6, 5, 3), (3, 2, 3, 6), ("NHWC", "HWIO", "NHWC"), {"batch_group_count": 2}),
}


def convolution(name):
    """And an argument, a pair of arrays."""
    shape, kernel_shape, order, options = CONVOLUTIONS[name]
    rng = np.random.default_rng(0)
    options = {"window_strides": (1,) * (len(shape) - 2), "padding": "SAME", "dimension_numbers": order} | options
    if "lhs_dilation" in options:
        options["padding"] = [(1, 1)] * (len(shape) - 2)

    def function(pair):
        return jax.lax.conv_general_dilated(*pair, **options)

    return function, (jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.normal(size=kernel_shape)))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_derivatives_are_the_same(name):
    function, pair = convolution(name)

    def sharpness(pair):
        return jax.grad(lambda pair: jnp.sum(jnp.sin(function(pair))))(pair)

    for each in (function, sharpness):
        got, want = jax.jit(lambda pair, each=each: (with_convolutions_in_order(each)(pair), each(pair)))(pair)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, want)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_axes_of_every_convolution_are_in_order(name):
    function, pair = convolution(name)
    gradient = jax.jit(jax.grad(lambda pair: jnp.sum(jnp.sin(function(pair)))))
    text = jax.jit(with_convolutions_in_order(gradient)).lower(pair).as_text()
    orders = [line.split("dim_numbers = ")[1].split(",\n")[0] for line in text.splitlines() if "dim_numbers" in line]
    space = ", ".join(str(i) for i in range(pair[0].ndim - 2))
    assert orders
    for order in orders:
        assert order.startswith(f"[b, {space}, f]x[{space}, i, o]->[b, {space}, f]")


def test_what_has_no_convolution_is_left_as_it_is():
    def function(x):
        return {"sum": jnp.sum(x), "sine": jnp.sin(x)}

    x = jnp.arange(3.0)
    got = jax.jit(with_convolutions_in_order(function)).lower(x).as_text()
    assert got.replace("ordered", "function") == jax.jit(function).lower(x).as_text()


def test_the_hessian_of_a_convolution_is_that_of_its_matrix():
    function, (x, kernel) = convolution("two axes")

    def loss(kernel):
        return jnp.sum(jnp.sin(function((x, kernel))))

    dense = jax.jit(jax.hessian(lambda flat: loss(flat.reshape(kernel.shape))))(kernel.reshape(-1))
    vector = jnp.asarray(np.random.default_rng(1).normal(size=kernel.shape))
    got = product(Hessian(loss, kernel), vector).reshape(-1)
    np.testing.assert_allclose(got, dense @ vector.reshape(-1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_the_equations_up_to_one_and_those_from_it_on_make_the_whole(place):
    def function(x, y):
        return jnp.sin(x) * y, jnp.exp(x * y)

    x, y = jnp.array([0.3, 0.7]), jnp.array([2.0, -1.0])
    program = jax.make_jaxpr(function)(x, y).jaxpr
    assert len(program.eqns) == 4
    found = [value for equation in program.eqns[:place] for value in equation.outvars]
    before = as_function(program, program.eqns[:place], program.invars, [*program.invars, *found])
    after = as_function(program, program.eqns[place:], [*program.invars, *found], program.outvars)
    for got, want in zip(after(*before(x, y)), function(np.asarray(x), np.asarray(y)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-15)
