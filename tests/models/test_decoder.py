import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import raises
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import flatjax
from flatjax.core.trees import leaf_path, leaves_by_path, with_leaves
from flatjax.layers.kernels import find_layers
from flatjax.models import Decoder, DecoderConfig, RotaryScaling, decoder_shardings
from flatjax.models.decoder.parts import Norm, attend
from flatjax.models.decoder.rotary import frequencies, rotate

SCALING = RotaryScaling(factor=4.0, low_frequency_factor=1.0, high_frequency_factor=4.0, context=32)
LLAMA = DecoderConfig(vocab_size=12, width=8, depth=2, num_heads=4, num_key_value_heads=2, rotary_scaling=SCALING)
GPT = DecoderConfig(
    vocab_size=11,
    width=8,
    depth=2,
    num_heads=2,
    context=6,
    positions="learned",
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    query_key_value_bias=True,
    output_bias=True,
    perceptron_bias=True,
)
NEOX = dataclasses.replace(GPT, positions="rotary", rotary_share=0.5, activation="gelu", parallel=True, tied=False)
QWEN = dataclasses.replace(LLAMA, head_width=6, query_key_norm=True, tied=False, inner_width=10)
KINDS = {"llama": LLAMA, "gpt": GPT, "neox": NEOX, "qwen": QWEN}
EVERY_KIND = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
TOKENS = np.array([[0, 7, 3, 8, 1], [2, 7, 2, 8, 6], [6, 7, 0, 8, 5], [9, 9, 4, 1, 10]])


def drawn(config, dtype=jnp.float64, seed=0):
    """(graphdef, params): no scale is 1 and no bias 0."""
    rng = np.random.default_rng(seed)

    def draw(keys, leaf):
        if leaf_path(keys).endswith("scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), dtype)
        size = leaf.shape[0] ** -0.5 if leaf.ndim > 1 else 0.3
        return jnp.asarray(size * rng.normal(size=leaf.shape), dtype)

    abstract = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract, nnx.Param)
    return graphdef, jax.tree_util.tree_map_with_path(draw, params)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, tokens):
    return nnx.merge(graphdef, params)(tokens)


@EVERY_KIND
def test_a_position_sees_every_earlier_one_their_order_and_no_later_one(config):
    logits = functools.partial(logits_of, *drawn(config))
    before = np.asarray(logits(TOKENS))
    for position in range(5):
        changed = TOKENS.copy()
        changed[:, position] = (TOKENS[:, position] + 1) % 9
        after = np.asarray(logits(changed))
        np.testing.assert_array_equal(before[:, :position], after[:, :position])
        assert np.all(np.any(before[:, position:] != after[:, position:], axis=-1)), position
    swapped = logits(TOKENS[:, [1, 0, 2, 3, 4]])
    assert np.max(np.abs(before - swapped)[:, 2:]) > 1e-3


@EVERY_KIND
def test_the_logits_are_the_head_of_the_features_which_are_the_last_of_the_stream_normalised(config):
    graphdef, params = drawn(config)

    @jax.jit
    def parts(params, tokens):
        model = nnx.merge(graphdef, params)
        stream = model.stream(tokens)
        steps = model.embed(tokens), *(block(x) for block, x in zip(model.blocks, stream[:-1], strict=True))
        return stream, steps, model.features(tokens), model.norm(stream[-1])

    stream, steps, features, normalised = parts(params, TOKENS)
    np.testing.assert_array_equal(stream, steps)
    np.testing.assert_array_equal(features, normalised)
    head = nnx.merge(graphdef, params).head_params()
    matrix = np.asarray(head["embedding"][...]).T if config.tied else np.asarray(head["kernel"][...])
    np.testing.assert_allclose(logits_of(graphdef, params, TOKENS), features @ matrix, rtol=1e-12)


@EVERY_KIND
def test_the_parameters_are_all_of_its_state_and_each_moves_the_logits(config):
    graphdef, params, rest = nnx.split(nnx.merge(*drawn(dataclasses.replace(config, depth=1))), nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    slopes = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graphdef, p)(jnp.asarray(TOKENS))))))(params)
    for path, slope in leaves_by_path(slopes).items():
        # The same added to all keys is added to all scores of a query, unless it is turned with them.
        is_blind = path.endswith("key/bias") and config.positions == "learned"
        assert (np.max(np.abs(slope)) > 1e-6) != is_blind, path


def test_attention_with_grouped_queries_is_exact_to_float64():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(2, 5, 6, 4)), *rng.normal(size=(2, 2, 5, 2, 4))
    keys, values = (np.repeat(x, 3, axis=2) for x in (k, v))
    weights = np.exp(np.einsum("nthk,nshk->nhts", q, keys) / 2) * np.tril(np.ones((5, 5)))
    weights /= weights.sum(axis=-1, keepdims=True)
    got = attend(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(got, np.einsum("nhts,nshk->nthk", weights, values), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_normalisation_is_exact_to_float64(kind):
    x, scale, bias = np.random.default_rng(1).normal(size=(3, 4, 5))
    norm = Norm(5, kind, 0.1, dtype=jnp.float64, param_dtype=jnp.float64)
    norm.scale[...] = jnp.asarray(scale[0])
    centred = x
    if kind == "layer":
        norm.bias[...] = jnp.asarray(bias[0])
        centred = x - x.mean(axis=1, keepdims=True)
    want = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 0.1) * scale[0]
    np.testing.assert_allclose(norm(jnp.asarray(x)), want + bias[0] * (kind == "layer"), rtol=1e-13)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_normalisation_of_large_features_keeps_the_digits_of_float32(kind):
    x = 1e3 + np.random.default_rng(1).normal(size=(3, 50)).astype(np.float32)
    centred = x.astype(np.float64) - (x.mean(axis=1, keepdims=True, dtype=np.float64) if kind == "layer" else 0)
    want = centred / np.sqrt(np.mean(centred**2, axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(Norm(50, kind, 1e-6)(jnp.asarray(x)), want, atol=3e-4 if kind == "layer" else 1e-6)


@pytest.mark.parametrize("config", [LLAMA, NEOX], ids=["all of a head", "half of a head"])
def test_rotated_products_depend_on_the_distance_of_positions_alone(config):
    head = config.width_of_a_head
    q, k = (jnp.broadcast_to(x, (1, 7, 1, head)) for x in jnp.asarray(np.random.default_rng(2).normal(size=(2, head))))
    products = np.asarray(jnp.einsum("ntck,nsck->ts", rotate(q, config), rotate(k, config)))
    for distance in range(-6, 7):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=1e-12, atol=1e-13)
    assert np.ptp(products[0]) > 0.1
    kept = config.rotary_width
    np.testing.assert_array_equal(rotate(q, config)[..., kept:], q[..., kept:])


def test_scaled_rotary_positions_keep_fast_turns_and_slow_down_slow_ones():
    config = dataclasses.replace(LLAMA, head_width=64, rotary_scaling=dataclasses.replace(SCALING, context=256))
    usual = frequencies(dataclasses.replace(config, rotary_scaling=None))
    ratio, turns = frequencies(config) / usual, 256 * usual / (2 * np.pi)
    np.testing.assert_array_equal(ratio[turns >= 4], 1)
    np.testing.assert_array_equal(ratio[turns <= 1], 0.25)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 2
    assert np.all(np.diff(between) < 0)
    assert 0.25 < between.min() < between.max() < 1


@EVERY_KIND
def test_bfloat16_computes_what_float64_does_to_its_few_digits(config):
    exact, rounded = (logits_of(*drawn(config, dtype), TOKENS) for dtype in (jnp.float64, jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(rounded, float) - exact) < 0.05 * np.linalg.norm(exact)


def loss_of(graphdef):
    def loss(params, tokens):
        return flatjax.cross_entropy(nnx.merge(graphdef, params)(tokens)[:, :-1], tokens[:, 1:]).mean()

    return loss


@pytest.mark.parametrize(
    ("config", "path"),
    [(QWEN, "blocks/0/attention/value/kernel"), (GPT, "blocks/0/perceptron/down/kernel")],
    ids=["qwen", "gpt"],
)
def test_kappa_of_a_layer_is_that_of_the_dense_hessian(config, path):
    graphdef, params = drawn(dataclasses.replace(config, depth=1))
    loss, tokens = loss_of(graphdef), jnp.asarray(TOKENS[:2, :4])
    kernel = leaves_by_path(params)[path]
    hessian = jax.jit(jax.hessian(lambda kernel: loss(with_leaves(params, {path: kernel}, (path,)), tokens)))(kernel)
    want = np.einsum("is,it,ksku,ut->", kernel, kernel, hessian, np.eye(kernel.shape[1]))
    got = flatjax.layer_relative_flatness(loss, params, tokens, layer=path, method="weights")
    np.testing.assert_allclose(got.value, want, rtol=1e-10)


def test_the_profile_finds_every_layer_by_its_name_and_kappa_of_the_head_exactly():
    graphdef, params = drawn(dataclasses.replace(NEOX, depth=1))
    names = {f"attention/{name}" for name in ("query", "key", "value", "output")} | {"perceptron/up", "perceptron/down"}
    wanted = {f"blocks/0/{name}/kernel" for name in names} | {"head/kernel", "token_embedding/embedding"}
    assert set(find_layers(params)) == wanted
    batches, layers = [(TOKENS[:2],), (TOKENS[2:],)], ["head/kernel", "blocks/0/perceptron/down/kernel"]
    profile = flatjax.flatness_profile(
        loss_of(graphdef), params, batches, key=jax.random.key(0), layers=layers, num_probes=4, route="joint"
    )
    model = nnx.merge(graphdef, params)
    feats = jax.jit(lambda model, tokens: model.features(tokens))(model, TOKENS)[:, :-1]
    kappa = flatjax.relative_flatness(model.head_params(), feats, TOKENS[:, 1:])
    np.testing.assert_allclose(profile["head/kernel"].value, kappa, rtol=1e-10)
    assert profile["head/kernel"].num_probes == 0
    assert np.isfinite(profile[layers[1]].value)


@pytest.mark.parametrize(
    ("config", "axis_type"), [(QWEN, AxisType.Explicit), (NEOX, AxisType.Auto)], ids=["qwen, Explicit", "neox, Auto"]
)
def test_logits_and_second_derivatives_of_sharded_parameters_are_those_of_one_device(config, axis_type):
    config = dataclasses.replace(config, vocab_size=12, inner_width=12, depth=1)
    graphdef, params = drawn(config)

    @jax.jit
    def measured(params, tokens):
        slope = jax.grad(loss_of(graphdef))
        return nnx.merge(graphdef, params)(tokens), jax.jvp(lambda p: slope(p, tokens), (params,), (params,))[1]

    # Four devices have no whole head of keys each.
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    spread = jax.device_put(params, decoder_shardings(params, mesh))
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data", None)))
    got, want = measured(spread, tokens), measured(params, TOKENS)
    assert got[0].sharding.spec == PartitionSpec("data", None, "model")
    for (keys, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.max(np.abs(b)) + 1e-14, err_msg=leaf_path(keys))


def test_what_a_mesh_divides_is_split_and_the_rest_replicated():
    _, params = drawn(dataclasses.replace(QWEN, vocab_size=11))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    specs = {path: each.spec for path, each in leaves_by_path(decoder_shardings(params, mesh)).items()}
    assert specs["blocks/0/attention/query/kernel"] == PartitionSpec(None, "model")
    assert specs["blocks/0/attention/output/kernel"] == PartitionSpec("model", None)
    assert specs["head/kernel"] == specs["token_embedding/embedding"] == PartitionSpec(None, None)  # 11 rows
    assert specs["blocks/0/perceptron/up/kernel"] == PartitionSpec(None, None)  # 10 columns
    assert specs["blocks/0/attention/query_norm/scale"] == specs["norm/scale"] == PartitionSpec(None)
    assert all(
        each.is_fully_replicated for each in jax.tree.leaves(decoder_shardings(params, jax.make_mesh((8,), "d")))
    )


def test_a_config_is_what_json_says_of_it():
    for config in KINDS.values():
        assert DecoderConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads is 3, wanted a divisor of width, 8"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, wanted a divisor of num_heads, 4"),
        ({"positions": "alibi"}, "positions is 'alibi', wanted one of 'learned', 'rotary'"),
        ({"activation": "relu"}, "activation is 'relu', wanted one of 'gelu', 'gelu_tanh', 'silu'"),
        ({"norm": "batch"}, "norm is 'batch', wanted one of 'layer', 'rms'"),
        ({"rotary_share": 0.5}, "rotary_share is 0.5 of heads of width 2, wanted it above 0"),
    ],
)
def test_sizes_that_do_not_divide_and_unknown_kinds_are_refused(change, message):
    with raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **change)


def test_a_text_beyond_the_learned_positions_is_refused():
    model = nnx.merge(*drawn(GPT))
    with raises(ValueError, match="tokens has 7 positions, wanted at most the 6 learned"):
        model(jnp.zeros((1, 7), int))


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["rotary", "learned"])
@pytest.mark.parametrize("token", [-1, -11, -100, 12, 2**31 - 1, -(2**31)])
def test_a_token_outside_of_the_vocabulary_is_nan_and_other_texts_are_untouched(config, token):
    logits, tokens = functools.partial(logits_of, *drawn(config)), TOKENS.copy()
    tokens[0, 1] = token
    got = np.asarray(logits(tokens))
    assert np.all(np.isnan(got[0, 1:]))
    np.testing.assert_array_equal(got[1:], logits(TOKENS)[1:])
