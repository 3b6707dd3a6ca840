"""Against what the transformers library computes from the same files: see make_golden.py."""

import json
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import raises
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from flatjax.core.optional import optional
from flatjax.loading import checkpoint, load_decoder, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
TOKENS = jnp.asarray(np.load(GOLDEN / "tokens.npy"), jnp.int32)


def published_logits(name):
    return np.load(GOLDEN / name / "logits.npy")


@jax.jit
def logits(model, tokens):
    return model(tokens)


@pytest.fixture
def copy(tmp_path):
    """(name, change of config.json, change of the tensors) -> a folder like that of golden."""

    def changed(name, config=None, tensors=None):
        folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        values = json.loads((folder / "config.json").read_text())
        values.update(config or {})
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
        if tensors is not None:
            arrays = load_file(folder / "model.safetensors")
            tensors(arrays)
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, folder / "model.safetensors")
        return folder

    return changed


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_are_those_of_the_transformers_library(name, record_property):
    want = published_logits(name)
    difference = np.max(np.abs(logits(load_decoder(GOLDEN / name), TOKENS) - want))
    record_property("largest difference", float(difference))
    print(f"{name}: logits up to {np.max(np.abs(want)):.2f}, largest difference {difference:.1e}")
    assert difference < 1e-5
    assert np.ptp(want) > 1


def test_every_family_is_there_and_both_kinds_of_heads_and_of_storage():
    kinds = [json.loads((GOLDEN / name / "config.json").read_text()) for name in FOLDERS]
    assert {kind["model_type"] for kind in kinds} == {"gpt2", "gpt_neox", "llama", "qwen2", "qwen3"}
    assert {kind["tie_word_embeddings"] for kind in kinds} == {True, False}
    assert {(GOLDEN / name / "model.safetensors").is_file() for name in FOLDERS} == {True, False}
    assert {kind["dtype"] for kind in kinds} == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64], ids=["bfloat16", "float64"])
def test_weights_are_cast_to_the_dtype_that_is_asked_for(dtype):
    model = load_decoder(GOLDEN / "qwen3", dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype(dtype)}
    got, want = logits(model, TOKENS), published_logits("qwen3")
    assert got.dtype == dtype
    error = np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)
    assert error < (0.03 if dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["gpt_neox", "llama"])
def test_loaded_onto_a_mesh_the_logits_are_the_same(name, axis_type, copy):
    def to_64_tokens(arrays):
        for key in ("gpt_neox.embed_in.weight", "embed_out.weight"):
            arrays[key] = np.concatenate([arrays[key], 0 * arrays[key][:3]])

    folder = copy(name, {"vocab_size": 64}, to_64_tokens) if name == "gpt_neox" else GOLDEN / name
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    model = load_decoder(folder, mesh=mesh)
    split = model.blocks[1].attention.query.kernel[...], model.blocks[0].perceptron.down.kernel[...]
    assert [kernel.addressable_shards[0].data.shape for kernel in split] == [(24, 6), (7, 24)]
    if name == "gpt_neox":
        assert model.head.kernel[...].addressable_shards[0].data.shape == (24, 16)
    tokens = jax.device_put(TOKENS, NamedSharding(mesh, PartitionSpec("data", None)))
    assert np.max(np.abs(np.asarray(logits(model, tokens))[..., :61] - published_logits(name))) < 1e-5


def test_older_files_without_prefixes_with_masks_and_with_the_head_of_a_tied_model_are_read(copy):
    def as_first_published(arrays):
        for key in list(arrays):
            arrays[key.removeprefix("transformer.")] = arrays.pop(key)
        arrays["h.0.attn.bias"] = np.tril(np.ones((1, 1, 20, 20), np.float32))
        arrays["h.1.attn.masked_bias"] = np.asarray(-1e4, np.float32)
        arrays["lm_head.weight"] = arrays["wte.weight"]

    folder = copy("gpt2", {"tie_word_embeddings": "absent", "n_ctx": 20}, as_first_published)
    np.testing.assert_array_equal(logits(load_decoder(folder), TOKENS), logits(load_decoder(GOLDEN / "gpt2"), TOKENS))


def test_older_names_of_rotary_positions_are_read(copy):
    def with_buffers(arrays):
        arrays["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        arrays["gpt_neox.layers.0.attention.bias"] = np.ones((1, 1, 64, 64), bool)
        arrays["lm_head.weight"] = arrays.pop("embed_out.weight")

    neox = copy("gpt_neox", {"rope_parameters": "absent", "rotary_pct": 0.5, "rotary_emb_base": 300}, with_buffers)
    scaling = json.loads((GOLDEN / "llama" / "config.json").read_text())["rope_parameters"]
    scaling["type"] = scaling.pop("rope_type")
    base = scaling.pop("rope_theta")
    llama = copy("llama", {"rope_parameters": "absent", "rope_scaling": scaling, "rope_theta": base})
    for folder in (neox, llama):
        assert np.max(np.abs(logits(load_decoder(folder), TOKENS) - published_logits(folder.name))) < 1e-5


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    config = json.loads((GOLDEN / "llama" / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256)}
    shapes |= {"self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256)}
    shapes |= {"mlp.down_proj": (256, 512), "input_layernorm": (256,), "post_attention_layernorm": (256,)}
    arrays = {
        f"model.layers.{i}.{name}.weight": np.ones(shape, np.float32)
        for i in range(8)
        for name, shape in shapes.items()
    }
    arrays |= {
        "model.embed_tokens.weight": np.ones((61, 256), np.float32),
        "model.norm.weight": np.ones(256, np.float32),
    }
    save_file(arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    total, largest = sum(array.nbytes for array in arrays.values()), 4 * 512 * 256
    del arrays
    # Devices of this kind share the host's memory, and an array of theirs may be the one that was read.
    place = checkpoint._placed
    monkeypatch.setattr(checkpoint, "_placed", lambda part, sharding: place(part, sharding) * 1)
    load_decoder(tmp_path)  # compiles, which takes memory too
    tracemalloc.start()
    try:
        load_decoder(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"peak {peak / largest:.1f} times the largest tensor, of {total / largest:.1f} in all")
    assert peak < 3 * largest < total / 10


def test_the_tokenizer_neither_cuts_off_nor_pads():
    tokenizer = load_tokenizer(GOLDEN / "llama")
    text = "the quick brown fox jumps over a flat head"
    ids = tokenizer.encode(text).ids
    assert len(ids) > 6
    assert max(ids) < 61
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("fox").ids) < 6


def test_a_folder_has_no_revisions_and_a_name_that_the_hub_does_not_have_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"revision is 'step5', but .*llama is a folder"):
        load_decoder(GOLDEN / "llama", revision="step5")

    def snapshot_download(name, **_):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"someone/a-llama is no folder here, and the hub .*no network"):
        load_decoder("someone/a-llama")


def test_a_name_is_fetched_from_the_hub_with_its_revision_and_no_other_formats(monkeypatch):
    calls = []

    def snapshot_download(name, *, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(GOLDEN / "llama")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    model = load_decoder("someone/a-llama", revision="step1000")
    np.testing.assert_array_equal(logits(model, TOKENS), logits(load_decoder(GOLDEN / "llama"), TOKENS))
    load_tokenizer("someone/a-llama")
    assert [call[:2] for call in calls] == [("someone/a-llama", "step1000"), ("someone/a-llama", None)]
    assert not any("bin" in pattern for _, _, patterns in calls for pattern in patterns)


def test_without_the_extra_the_error_says_what_to_install():
    with raises(ImportError, match=r"read with no_such_package, .* pip install 'flatjax\[llm\]'"):
        optional("no_such_package")
