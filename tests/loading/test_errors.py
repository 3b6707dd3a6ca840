"""Whatever is wrong with a checkpoint is listed, all at once."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import raises
from safetensors.numpy import load_file, save_file

from flatjax.loading import load_decoder, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def copied(tmp_path):
    def of(name):
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return of


def with_tensors(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type 'mamba', wanted one of 'gpt2', 'gpt_neox', 'llama', 'qwen2', "),
        ("llama", {"model_type": None}, "model_type None, wanted one of"),
        ("llama", {"hidden_size": None, "vocab_size": None}, "of a 'llama' lacks vocab_size, hidden_size"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClas"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "own.Model"}}, "auto_map is {'AutoModelForCausalLM'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu', wanted one of 'gelu', "),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn', wanted 'default' or",
        ),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', wanted 'default' or"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "'llama3' without low_freq_factor; "),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "wanted the same for all layers"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, wanted 1"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, wanted False"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention', "),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False, wanted True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True, wanted False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu', wanted one of"),
        ("gpt_neox", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic', wanted"),
    ],
    ids=str,
)
def test_what_the_decoder_does_not_do_is_named(name, change, message, copied):
    path = copied(name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with raises(ValueError, match=re.escape(message)):
        load_decoder(path.parent)


def test_everything_that_is_wrong_with_the_tensors_is_listed_at_once(copied):
    def change(arrays):
        del arrays["transformer.h.1.mlp.c_fc.bias"], arrays["transformer.ln_f.weight"]
        arrays["transformer.h.0.attn.c_attn.weight"] = arrays["transformer.h.0.attn.c_attn.weight"].T.copy()
        arrays["transformer.h.2.ln_1.bias"] = np.zeros(24, np.float32)
        arrays["wte.weight"] = arrays["transformer.wte.weight"]
        arrays["score.weight"] = np.zeros((2, 24), np.float32)
        arrays["transformer.wpe.weight"] = arrays["transformer.wpe.weight"].astype(np.int8)

    with pytest.raises(ValueError, match=r"are not those of its config\.json") as caught:
        load_decoder(with_tensors(copied("gpt2"), change))
    _, listed = str(caught.value).split("config.json: ")
    assert set(listed.split("; ")) == {
        "h.1.mlp.c_fc.bias is missing",
        "ln_f.weight is missing",
        "transformer.h.0.attn.c_attn.weight has shape (72, 24), wanted (24, 72)",
        "transformer.h.2.ln_1.bias is not known",
        "score.weight is not known",
        "wte.weight is there again as transformer.wte.weight",
        "transformer.wpe.weight has dtype I8, wanted F64, F32, F16 or BF16",
    }


def test_sizes_that_the_config_does_not_have_are_listed_with_both_shapes(copied):
    path = copied("llama") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_key_value_heads": 4}))
    with raises(ValueError, match=r"layers\.1\.self_attn\.v_proj\.weight has shape \(12, 24\), wanted \(24, 24\)"):
        load_decoder(path.parent)


def test_a_head_that_is_not_the_embedding_of_a_tied_model_is_refused(copied):
    def change(arrays):
        arrays["lm_head.weight"] = 2 * arrays["model.embed_tokens.weight"]

    with raises(ValueError, match=r"lm_head\.weight is not model\.embed_tokens\.weight, though tie_word_embeddings"):
        load_decoder(with_tensors(copied("qwen2"), change))


def test_an_untied_head_that_is_not_there_is_missing(copied):
    with raises(ValueError, match=r"lm_head\.weight is missing"):
        load_decoder(with_tensors(copied("qwen3"), lambda arrays: arrays.pop("lm_head.weight")))


def test_what_is_missing_of_a_folder_is_named(copied, tmp_path):
    folder = copied("llama")
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with raises(FileNotFoundError, match=r"has no model-00002-of-00003\.safetensors that .*index\.json names"):
        load_decoder(folder)
    (folder / "model.safetensors.index.json").unlink()
    with raises(FileNotFoundError, match=r"has no model\.safetensors or .*; other formats are not read"):
        load_decoder(folder)
    (folder / "config.json").unlink()
    with raises(FileNotFoundError, match=r"has no config\.json"):
        load_decoder(folder)
    (folder / "tokenizer.json").unlink()
    with raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        load_tokenizer(folder)
    for absent in (tmp_path / "none", str(tmp_path / "none"), "./none", "a/b/c"):
        with raises(FileNotFoundError, match="there is no folder"):
            load_decoder(absent)


def test_an_index_that_does_not_fit_its_files_is_refused(copied):
    path = copied("llama") / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = index["weight_map"]
    files["model.norm.weight"], first = "model-00001-of-00003.safetensors", files.pop("model.embed_tokens.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit its files") as caught:
        load_decoder(path.parent)
    assert "model.norm.weight is not in model-00001-of-00003.safetensors" in str(caught.value)
    assert f"model.embed_tokens.weight in {first} is not in the index" in str(caught.value)
    files["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with raises(ValueError, match=r"names files outside of .*: \.\./elsewhere\.safetensors"):
        load_decoder(path.parent)


def test_what_is_no_folder_and_no_dtype_is_refused_by_name():
    with raises(TypeError, match="path_or_hub_name is a int, wanted a folder"):
        load_decoder(3)
    with raises(TypeError, match="dtype is 'bf16', wanted a floating one, as 'bfloat16'"):
        load_decoder(GOLDEN / "llama", dtype="bf16")
