"""Which of a folder's weights are read, and what a checkpoint is known by."""

import os
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers import raises
from safetensors.numpy import load_file, save_file

from flatjax.loading import load_decoder, open_checkpoint
from flatjax.loading.headers import Entry, sample

GOLDEN = Path(__file__).parent / "golden"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def parts_of(folder):
    return sorted(folder.glob("model-*.safetensors"))


def tensors_of(folder):
    return {name: array for part in parts_of(folder) for name, array in load_file(part).items()}


@pytest.fixture
def both(tmp_path):
    """The parts of golden, and a single file of which a head is twice as large."""
    folder = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))
    arrays = tensors_of(folder)
    arrays["lm_head.weight"] = arrays["lm_head.weight"] * ml_dtypes.bfloat16(2)
    save_file(arrays, folder / SINGLE)
    return folder


def written(files, seconds):
    for file in files:
        os.utime(file, (seconds, seconds))


def scale_of_head(folder):
    head, of_parts = (load_decoder(each).head.kernel[...] for each in (folder, GOLDEN / "llama"))
    return float(head.sum() / of_parts.sum())


@pytest.mark.parametrize(("of_single", "of_parts", "scale"), [(2000, 1000, 2), (1000, 2000, 1)])
def test_of_two_that_differ_the_newer_is_read(of_single, of_parts, scale, both):
    written([both / SINGLE], of_single)
    written(parts_of(both), of_parts)
    written([both / INDEX], 3000)  # of which no weight is read
    np.testing.assert_allclose(scale_of_head(both), scale, rtol=1e-6)


def test_where_neither_is_clearly_newer_both_are_named(both):
    written([*parts_of(both), both / SINGLE], 1000)
    for newest in (parts_of(both)[0], both / SINGLE):
        written([newest], 1001)
        message = f"{both}/model-00001-of-00003.safetensors to model-00003-of-00003.safetensors"
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load_decoder(both)
        assert f"{both / SINGLE} and " in str(caught.value)


def test_of_two_that_are_the_same_either_is_read(both):
    save_file(tensors_of(both), both / SINGLE)
    assert scale_of_head(both) == 1


def test_of_two_the_one_that_is_whole_is_read(both):
    written([both / SINGLE], 1000)
    parts_of(both)[1].unlink()
    np.testing.assert_allclose(scale_of_head(both), 2, rtol=1e-6)


def test_of_two_the_one_that_has_all_tensors_is_read(both):
    save_file({"lm_head.weight": tensors_of(both)["lm_head.weight"]}, both / SINGLE)
    assert scale_of_head(both) == 1


def test_of_two_that_are_not_whole_both_are_named(both):
    first = parts_of(both)[0]
    for file in (first, both / SINGLE):
        arrays = load_file(file)
        arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"][:5].copy()
        save_file(arrays, file)
    with raises(
        ValueError, match=r"embed_tokens\.weight has shape .*; and the tensors in .*embed_tokens\.weight has shape"
    ):
        load_decoder(both)


@pytest.mark.parametrize(
    ("name", "embedding", "head"),
    [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("gpt_neox_sequential", "gpt_neox.embed_in.weight", "embed_out.weight"),
        ("llama_biased", "model.embed_tokens.weight", "lm_head.weight"),
        ("qwen2", "model.embed_tokens.weight", "lm_head.weight"),
    ],
)
def test_the_one_matrix_of_a_tied_model_is_read_under_either_name_or_both(name, embedding, head, tmp_path):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    arrays, digest = load_file(folder / SINGLE), open_checkpoint(folder).digest()
    wanted = load_decoder(folder).token_embedding.embedding[...]
    for names in ([head], [embedding, head]):
        changed = {key: array for key, array in arrays.items() if key != embedding}
        save_file(changed | dict.fromkeys(names, arrays[embedding]), folder / SINGLE)
        np.testing.assert_array_equal(load_decoder(folder).token_embedding.embedding[...], wanted)
        assert open_checkpoint(folder).digest() == digest


def test_a_checkpoint_is_known_by_its_weights_wherever_they_lie(both, tmp_path):
    digest = open_checkpoint(GOLDEN / "llama").digest()
    moved = both.rename(tmp_path / "moved")
    save_file(tensors_of(moved), moved / SINGLE)
    for part in parts_of(moved):
        part.unlink()
    assert open_checkpoint(moved).digest() == digest


def test_another_weight_or_configuration_is_another_checkpoint(both):
    for part in parts_of(both):
        part.unlink()
    digests = {open_checkpoint(both).digest()}
    arrays = load_file(both / SINGLE)
    for i, name in enumerate(arrays):
        arrays[name].reshape(-1)[i % arrays[name].size] += ml_dtypes.bfloat16(1)
        save_file(arrays, both / SINGLE)
        digests.add(open_checkpoint(both).digest())
    config = both / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    digests.add(open_checkpoint(both).digest())
    assert len(digests) == len(arrays) + 2


def test_a_large_tensor_is_sampled_from_its_first_byte_to_its_last(tmp_path):
    size = 5_000_000
    content = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    file = tmp_path / "tensor"

    def of(content, start=0):
        file.write_bytes(bytes(start) + content.tobytes())
        return sample(Entry(file, "U8", (size,), start, start + size))

    whole = of(content)
    assert len(whole) < size / 4
    assert whole == of(content, start=17)
    for place in (0, size - 1, slice(None, None, 100_000)):
        changed = content.copy()
        changed[place] ^= 1
        assert of(changed) != whole
