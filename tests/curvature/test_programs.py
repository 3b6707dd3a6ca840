"""A program taken apart is the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.curvature.programs import as_function


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
