"""What is computed in float64: all that any float64 enters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flatjax.core.dtypes import computing_dtype

SINGLE, DOUBLE = jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float64)


@pytest.mark.parametrize(
    "values",
    [
        (DOUBLE,),
        (SINGLE, DOUBLE),
        ({"kernel": SINGLE, "bias": [DOUBLE]},),
        (np.dtype("float64"),),
        ("float64",),
        (jnp.bfloat16, jnp.float64),
        (jax.ShapeDtypeStruct((2,), jnp.float64),),
    ],
)
def test_it_is_float64_if_anything_is(values):
    assert computing_dtype(*values) == jnp.float64


@pytest.mark.parametrize(
    "values", [(), (SINGLE,), (jnp.bfloat16,), ("float16", jnp.arange(2)), ({"kernel": jnp.ones(2, jnp.bfloat16)},)]
)
def test_it_is_float32_of_all_else(values):
    assert computing_dtype(*values) == jnp.float32


def test_float64_of_numpy_is_float32_where_jax_has_not_enabled_it():
    with jax.enable_x64(False):
        assert computing_dtype(np.ones(2)) == jnp.float32
