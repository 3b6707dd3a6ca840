"""A head is read from every layout, and from nothing else."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze

from flatjax.heads import linear_head

KERNEL = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize("params", [{"kernel": KERNEL}, {"embedding": KERNEL.T}, {"kernel": KERNEL, "bias": None}])
def test_weights_have_a_row_an_output_and_the_missing_bias_is_zero(params):
    head = linear_head(params)
    np.testing.assert_array_equal(head.weight, KERNEL.T)
    np.testing.assert_array_equal(head.bias, np.zeros(3))
    assert head.bias.dtype == head.weight.dtype
    assert (head.num_outputs, head.num_features) == (3, 4)


LAYERS = {
    "nnx.Linear": lambda: nnx.state(nnx.Linear(4, 3, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))),
    "nnx.Linear without bias": lambda: nnx.state(nnx.Linear(4, 3, use_bias=False, rngs=nnx.Rngs(0)), nnx.Param),
    "nnx.Embed": lambda: nnx.state(nnx.Embed(3, 4, rngs=nnx.Rngs(0))),
    "linen.Dense": lambda: linen.Dense(3).init(jax.random.key(0), jnp.ones(4, "float32"))["params"],
    "linen.Embed": lambda: linen.Embed(3, 4).init(jax.random.key(0), jnp.zeros(1, int))["params"],
    "frozen": lambda: freeze({"kernel": KERNEL, "bias": np.ones(3)}),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_parameters_of_a_flax_layer_are_read_as_they_are(layer):
    params = LAYERS[layer]()
    arrays = {name: np.asarray(params[name][...]) for name in params}
    head = linear_head(params)
    np.testing.assert_array_equal(head.weight, arrays["kernel"].T if "kernel" in arrays else arrays["embedding"])
    np.testing.assert_array_equal(head.bias, arrays.get("bias", np.zeros(3)))


def test_logits_are_those_of_the_layer():
    layer = nnx.Linear(4, 3, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    feats = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), "float32")
    np.testing.assert_allclose(linear_head(nnx.state(layer)).logits(feats), layer(feats), rtol=1e-6)


@pytest.mark.parametrize(
    ("error", "match", "params"),
    [
        (TypeError, r"params is a ndarray, wanted a mapping .* nnx.state\(layer\)", KERNEL),
        (TypeError, r"params is a list, wanted a mapping", [KERNEL]),
        (ValueError, r"keys \[\], wanted 'kernel' \(m, d\) or 'embedding' \(d, m\)", {}),
        (ValueError, r"keys \['bias'\], wanted 'kernel'", {"bias": np.zeros(3)}),
        (ValueError, r"keys \['bias', 'kernel'\], wanted 'kernel'", {"kernel": None, "bias": np.zeros(3)}),
        (ValueError, r"keys \['params'\], wanted 'kernel'.*of the head alone", {"params": {"kernel": KERNEL}}),
        (ValueError, r"keys \['embedding', 'kernel'\]", {"kernel": KERNEL, "embedding": KERNEL.T}),
        (ValueError, r"keys \['kernel', 'scale'\]", {"kernel": KERNEL, "scale": np.ones(3)}),
        (ValueError, r"keys \['0'\]", {0: KERNEL}),
        (
            ValueError,
            r"kernel has shape \(4,\), wanted \(m, d\), \(in, out\).*reshape the kernel",
            {"kernel": KERNEL[:, 0]},
        ),
        (ValueError, r"kernel has shape \(4, 3, 1\), wanted \(m, d\)", {"kernel": KERNEL[..., None]}),
        (ValueError, r"kernel has shape \(0, 3\), wanted .* both at least 1", {"kernel": KERNEL[:0]}),
        (ValueError, r"embedding has shape \(0, 4\), wanted \(d, m\)", {"embedding": KERNEL.T[:0]}),
        (ValueError, r"bias has shape \(4,\), but kernel has 3 outputs", {"kernel": KERNEL, "bias": np.zeros(4)}),
        (ValueError, r"bias has shape \(1, 3\), but kernel has 3", {"kernel": KERNEL, "bias": np.zeros((1, 3))}),
        (ValueError, r"bias has shape \(\), but embedding has 3", {"embedding": KERNEL.T, "bias": np.zeros(())}),
        (TypeError, "kernel has dtype int64, wanted a floating dtype", {"kernel": KERNEL.astype(int)}),
        (TypeError, "embedding has dtype complex128, wanted", {"embedding": KERNEL.T.astype(complex)}),
        (TypeError, "bias has dtype bool, wanted a floating dtype", {"kernel": KERNEL, "bias": np.zeros(3, bool)}),
    ],
)
def test_what_is_no_head_is_refused(error, match, params):
    with helpers.raises(error, match):
        linear_head(params)
