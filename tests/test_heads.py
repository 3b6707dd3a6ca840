"""A head is read from every layout, and from nothing else."""

from types import MappingProxyType

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import freeze

from flatjax.core.arrays import as_arrays
from flatjax.heads import head_arrays, linear_head

KERNEL = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    "params",
    [
        {"kernel": KERNEL},
        {"weight": KERNEL.T},
        {"embedding": KERNEL.T},
        {"kernel": KERNEL, "bias": None},
        {"params": {"kernel": KERNEL}},
        MappingProxyType({"weight": KERNEL.T}),
    ],
)
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


FEATS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), "float32")


@pytest.mark.parametrize("num_outputs", [3, 4])
def test_a_layer_of_flax_is_a_head_itself(num_outputs):
    layer = nnx.Linear(4, num_outputs, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    table = nnx.Embed(num_outputs, 4, rngs=nnx.Rngs(0))
    for params in (layer, nnx.state(layer)):
        np.testing.assert_allclose(linear_head(params).logits(FEATS), layer(FEATS), rtol=1e-6)
    np.testing.assert_allclose(linear_head(table).logits(FEATS), table.attend(FEATS), rtol=1e-6)


@pytest.mark.parametrize("num_outputs", [3, 4])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_of_pytorch_is_a_head_itself_and_so_is_its_state(num_outputs, has_bias):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(4, num_outputs, bias=has_bias)
    want = layer(torch.tensor(FEATS.tolist())).detach().numpy()
    for params in (layer, layer.state_dict(), dict(layer.named_parameters())):
        logits = np.asarray(FEATS) @ np.asarray(as_arrays("params", head_arrays(params)["weight"])).T
        shift = np.asarray(as_arrays("params", head_arrays(params)["bias"])) if has_bias else 0
        np.testing.assert_allclose(logits + shift, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_outputs", [3, 4])
def test_a_layer_of_equinox_is_a_head_itself(num_outputs):
    equinox = pytest.importorskip("equinox")
    layer = equinox.nn.Linear(4, num_outputs, dtype=jnp.float32, key=jax.random.key(0))
    np.testing.assert_allclose(linear_head(layer).logits(FEATS), jax.vmap(layer)(FEATS), rtol=1e-5, atol=1e-6)


def test_a_layer_with_more_than_a_head_is_refused():
    with helpers.raises(ValueError, r"keys \['bias', 'kernel', 'lora.lora_a', 'lora.lora_b'\]"):
        linear_head(nnx.LoRALinear(4, 3, lora_rank=2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("error", "match", "params"),
    [
        (
            TypeError,
            r"ndarray of shape \(4, 3\), wanted.*'kernel': W.*\(in, out\).*'weight': W.*\(out, in",
            KERNEL,
        ),
        (TypeError, r"params is a list, wanted a mapping that names its layout", [KERNEL]),
        (TypeError, r"params is a str, wanted a mapping", "head"),
        (ValueError, r"keys \[\], wanted one of 'kernel' \(m, d\), 'weight' \(d, m\) and 'embedding' \(d, m\)", {}),
        (ValueError, r"keys \['bias'\], wanted one of 'kernel'", {"bias": np.zeros(3)}),
        (ValueError, r"keys \['bias'\], wanted one of 'kernel'", {"kernel": None, "bias": np.zeros(3)}),
        (ValueError, r"\['head'\].*the head alone, those of 'head' say", {"params": {"head": {"kernel": KERNEL}}}),
        (ValueError, r"'fc.weight'.*head alone, those of 'fc' say", {"fc.bias": KERNEL[0], "fc.weight": KERNEL.T}),
        (ValueError, r"of embedding and kernel give one", {"kernel": KERNEL, "embedding": KERNEL.T}),
        (ValueError, r"of kernel and weight give one", {"kernel": KERNEL, "weight": KERNEL.T}),
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
