"""Nothing that is malformed is read, built or guessed at: an error names the file and the key."""

import json
import re
import shutil
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import raises
from safetensors.numpy import load_file, save_file

from flatjax.loading import load_decoder, load_tokenizer, open_checkpoint
from flatjax.loading.families import read_config
from flatjax.loading.headers import read_header
from flatjax.loading.shapes import decoder_shapes
from flatjax.models import Decoder

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Of which no decoder is built."""

    def build(*_, **__):
        raise AssertionError("a decoder was built")

    monkeypatch.setattr("flatjax.loading.checkpoint.Decoder", build)
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def config_of(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize("name", FOLDERS)
def test_shapes_are_those_of_the_decoder(name):
    config = read_config(config_of(name))
    params = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param))
    assert decoder_shapes(config) == {"/".join(map(str, path)): leaf.shape for path, leaf in params}


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "head_dim")


@pytest.mark.parametrize("value", [0, -3, True, "24", 24.0, 2.5, float("nan"), [24], {}, 10**30, 10**400], ids=str)
def test_a_size_is_a_whole_number_above_0(value, copied):
    path = copied("qwen3") / "config.json"
    for key in SIZES:
        path.write_text(json.dumps(config_of("qwen3") | {key: value}))
        with raises(
            ValueError, match=rf"{re.escape(str(path))} of a 'qwen3' is malformed: {key} is .*, wanted a whole"
        ):
            load_decoder(path.parent)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", ("rms_norm_eps", "rope_theta", "rope_parameters.factor", "rope_parameters.rope_theta")),
        ("gpt_neox", ("layer_norm_eps", "rotary_emb_base", "rotary_pct", "rope_parameters.partial_rotary_factor")),
        ("gpt2", ("layer_norm_epsilon",)),
    ],
)
def test_a_number_is_finite_and_above_0(name, keys):
    for key in keys:
        for value in (0, -1e-6, float("nan"), float("inf"), 10**400, 1e300, 1e-300, "1e-6", True, [1.0]):
            config, (*within, last) = config_of(name), key.split(".")
            (config[within[0]] if within else config)[last] = value
            with raises(ValueError, match=rf"config\.json of a '{name}' is malformed: {key} is .*, wanted a number ab"):
                read_config(config)


@pytest.mark.parametrize(
    ("name", "key"), [("llama", "tie_word_embeddings"), ("llama", "mlp_bias"), ("gpt_neox", "use_parallel_residual")]
)
@pytest.mark.parametrize("value", ["false", 0, 1.0, []], ids=repr)
def test_a_flag_is_true_or_false(name, key, value):
    with raises(ValueError, match=rf"malformed: {key} is .*, wanted true or false"):
        read_config(config_of(name) | {key: value})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2", {"num_attention_heads": 5}, "hidden_size is 24, wanted a multiple of num_attention_heads, 5"),
        ("gpt2", {"n_head": 7}, "n_embd is 24, wanted a multiple of n_head, 7"),
        ("llama", {"num_key_value_heads": 3}, "num_attention_heads is 4, wanted a multiple of num_key_value_heads, 3"),
        ("llama", {"head_dim": 5}, "heads of width 5, wanted at most 1, and an even width"),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 1.5}, "rotary_pct is 1.5 of heads of width 8"),
        ("gpt_neox", {"rope_parameters": None, "rotary_pct": 0.1}, "rotary_pct is 0.1 of heads of width 8"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor is 4.0, wanted less than high_freq_factor, 4.0",
        ),
        ("llama", {"rope_scaling": "llama3"}, "rope_scaling is 'llama3', wanted an object"),
        ("qwen3", {"layer_types": 3}, "layer_types is 3, wanted a list"),
        ("qwen3", {"layer_types": [["full_attention"]]}, "layer_types has ['full_attention'], wanted 'full_attention'"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act is ['silu'], wanted one of"),
        ("llama", {"rope_parameters": {"rope_type": ["default"]}}, "rope_type is ['default'], wanted 'default' or"),
        ("llama", {"model_type": {"a": 1}}, "model_type {'a': 1}, wanted one of"),
        ("llama", {"architectures": 3}, "architectures is 3, wanted ['LlamaForCausalLM']"),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_named(name, change, message):
    with raises(ValueError, match=re.escape(message)):
        read_config(config_of(name) | change)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_null_is_as_if_its_key_were_not_there(name):
    config = config_of(name)
    for key in config:
        without = {other: value for other, value in config.items() if other != key}
        got, wanted = (_read_or_error(each) for each in (config | {key: None}, without))
        assert got == wanted
        assert "lacks" in str(got) or "model_type" in str(got) or got.depth == 2


def _read_or_error(config):
    try:
        return read_config(config)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON object"),
        (b"[]", r"holds \[\], wanted a JSON object"),
        (b"3", "holds 3, wanted a JSON object"),
        (b'{"a": 1', "is no JSON object"),
        (b'{"vocab_size": 61, "vocab_size": 62}', "is no JSON object: the key 'vocab_size' is there twice"),
        (b'{"a": "\xff"}', "is not UTF-8 at byte 7"),
        ("{}".encode("utf-16"), "is not UTF-8 at byte 0"),
        (b"[" * 200_000, "is no JSON object"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON object"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_json_that_is_no_object_is_named(content, message, copied):
    folder = copied("llama")
    for name in ("model.safetensors.index.json", "config.json"):
        (folder / name).write_bytes(content)
        with raises(ValueError, match=rf"{re.escape(str(folder / name))} {message}"):
            load_decoder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_in_the_place_of_a_file_is_named(name, copied):
    folder = copied("gpt2")
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with raises(FileNotFoundError, match=rf"{name} is a folder, wanted a file"):
        (load_tokenizer if name == "tokenizer.json" else load_decoder)(folder)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}']
)
def test_a_malformed_tokenizer_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with raises(ValueError, match=r"tokenizer\.json is no tokenizer: "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "weight_map in .* is None, wanted the file of each tensor"),
        ({}, r"weight_map in .* is \{\}, wanted the file"),
        (["a"], r"weight_map in .* is \['a'\], wanted the file"),
        ({"a": None}, "weight_map in .* has None for a, wanted the name of a file"),
        ({"a": "sub/b"}, "weight_map in .* names files outside of its folder: sub/b"),
        ({"a": ".."}, r"weight_map in .* names files outside of its folder: \.\."),
        ({"a": "/etc/hostname"}, "weight_map in .* names files outside"),
    ],
    ids=str,
)
def test_a_malformed_index_is_named(weight_map, message, copied):
    path = copied("llama") / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with raises(ValueError, match=message):
        load_decoder(path.parent)


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "none.safetensors"], ids=["", "long", "null", "absent"])
def test_a_part_that_cannot_be_a_file_is_not_there(name, copied):
    path = copied("llama") / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with raises(FileNotFoundError, match="that model.safetensors.index.json names"):
        load_decoder(path.parent)


def test_a_tensor_in_two_parts_is_named(copied):
    folder = copied("llama")
    parts = sorted(folder.glob("*.safetensors"))
    twice = load_file(parts[1]) | load_file(parts[0])
    save_file(twice, parts[1])
    with raises(ValueError, match=rf"does not fit its files: .* in {parts[1].name} is not in the index"):
        load_decoder(folder)


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]},
}


def write(path, header, size=18):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", r"the header of .* holds \[\]"),
        (b"{", "the header of .* is no JSON object"),
        (b"\xff\xff", "the header of .* is not UTF-8 at byte 0"),
        (HEADER | {"b": 3}, "b is 3, wanted an object"),
        (HEADER | {"b": HEADER["b"] | {"dtype": 5}}, "dtype of b is 5, wanted a text"),
        (HEADER | {"b": HEADER["b"] | {"shape": [-1]}}, r"shape of b is \[-1\], wanted a list of whole numbers"),
        (HEADER | {"b": HEADER["b"] | {"shape": [1.0]}}, r"shape of b is \[1.0\], wanted a list"),
        (HEADER | {"b": HEADER["b"] | {"shape": [10**400]}}, r"shape of b is \[10+…, wanted a list"),
        (HEADER | {"b": HEADER["b"] | {"shape": [2**62] * 400}}, r"b has 2 bytes, which are not those of BF16 of shap"),
        (HEADER | {"b": HEADER["b"] | {"dtype": "F32"}}, r"b has 2 bytes, which are not those of F32 of shape \(\)"),
        (HEADER | {"b": HEADER["b"] | {"data_offsets": [18, 16]}}, r"data_offsets of b is \[18, 16\], wanted"),
        (HEADER | {"b": HEADER["b"] | {"data_offsets": [16]}}, r"data_offsets of b is \[16\], wanted"),
        (HEADER | {"b": HEADER["b"] | {"data_offsets": None}}, "data_offsets of b is None, wanted"),
        (HEADER | {"b": HEADER["b"] | {"data_offsets": [14, 16]}}, "b starts at byte 14, but a ends at byte 16"),
        (HEADER | {"b": HEADER["b"] | {"data_offsets": [17, 19]}}, "b starts at byte 17, but a ends at byte 16"),
        ({"a": HEADER["a"]}, "a ends at byte 16, but the file has 18 bytes of tensors"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[-40:],
)
def test_a_malformed_header_is_named(header, message, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, HEADER)
    assert list(read_header(path)) == ["a", "b"]
    write(path, header)
    with pytest.raises(ValueError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0, 0.0001, 0.3, 0.999])
def test_a_file_that_is_cut_short_is_named(share, copied):
    path = copied("gpt2") / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with raises(ValueError, match=re.escape(str(path))):
        load_decoder(path.parent)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"num_hidden_layers": 100_000}, "num_hidden_layers is 100000, but there are tensors of 2 layers"),
        ("gpt2", {"n_layer": 100_000}, "n_layer is 100000, but there are tensors of 2 layers"),
        ("llama", {"vocab_size": 2**31 - 1}, r"embed_tokens.weight has shape \(61, 24\), wanted \(2147483647, 24\)"),
        ("llama", {"hidden_size": 2**30}, r"wanted \(61, 1073741824\)"),
        ("qwen3", {"num_attention_heads": 2**30, "head_dim": 2**30}, r"q_proj.weight has shape \(32, 24\), wanted"),
        ("gpt2", {"n_positions": 2**30}, r"wpe.weight has shape \(20, 24\), wanted \(1073741824, 24\)"),
    ],
    ids=str,
)
def test_a_config_larger_than_its_tensors_builds_nothing(name, change, message, copied):
    path = copied(name) / "config.json"
    path.write_text(json.dumps(config_of(name) | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_decoder(path.parent)
    assert len(str(caught.value)) < 5000


def change_of_tensors(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file({key: np.asarray(array, order="C") for key, array in arrays.items()}, folder / "model.safetensors")
    return folder


def test_the_head_of_a_tied_model_that_is_no_matrix_is_named(copied):
    def change(arrays):
        arrays["lm_head.weight"] = np.zeros((), np.float32)

    with raises(ValueError, match=r"lm_head\.weight has shape \(\), wanted \(61, 24\)"):
        load_decoder(change_of_tensors(copied("qwen2"), change))


def test_weights_that_are_not_finite_are_named_with_their_number(tmp_path):
    def change(arrays):
        arrays["transformer.h.1.mlp.c_fc.weight"][3, :2] = np.nan
        arrays["transformer.ln_f.bias"][5] = -np.inf

    folder = change_of_tensors(Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2")), change)
    with pytest.raises(ValueError, match=r"model\.safetensors are no finite numbers of float32: ") as caught:
        load_decoder(folder)
    assert "transformer.h.1.mlp.c_fc.weight holds 2 of 672 that are NaN or infinite" in str(caught.value)
    assert "transformer.ln_f.bias holds 1 of 24 that are NaN or infinite" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "of", "dtype"),
    [(1e39, np.float64, "float32"), (1e39, np.float64, "bfloat16"), (-7e4, np.float32, "float16"),
     (3.4e38, np.float32, "bfloat16")],
)  # fmt: skip
def test_weights_beyond_a_dtype_are_named(value, of, dtype, tmp_path):
    def change(arrays):
        arrays["transformer.wpe.weight"] = arrays["transformer.wpe.weight"].astype(of)
        arrays["transformer.wpe.weight"][0, 0] = value

    folder = change_of_tensors(Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2")), change)
    message = f"transformer.wpe.weight goes up to {abs(value):.4g}, which {dtype} cannot hold"
    with raises(ValueError, match=re.escape(message)):
        load_decoder(folder, dtype=dtype)


def test_a_dtype_that_is_no_floating_one_is_refused():
    with raises(ValueError, match="dtype is int8, wanted a floating one"):
        open_checkpoint(GOLDEN / "gpt2").load(dtype=np.int8)


@pytest.mark.parametrize("name", ["safetensors", "tokenizers", "huggingface_hub"])
def test_a_missing_extra_is_named_with_how_to_get_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    load, place = {
        "safetensors": (load_decoder, GOLDEN / "llama"),
        "tokenizers": (load_tokenizer, GOLDEN / "llama"),
        "huggingface_hub": (load_decoder, "someone/a-llama"),
    }[name]
    with raises(ImportError, match=rf"read with {name}, .*: pip install 'flatjax\[llm\]'"):
        load(place)


def test_bfloat16_weights_that_are_not_finite_are_named(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2"))

    def change(arrays):
        arrays["model.norm.weight"] = np.full(24, np.nan, ml_dtypes.bfloat16)

    with raises(ValueError, match=r"model\.norm\.weight holds 24 of 24 that are NaN"):
        load_decoder(change_of_tensors(folder, change), dtype="bfloat16")
