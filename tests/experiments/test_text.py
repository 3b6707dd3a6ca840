"""What of a text is trained on and what is not, and its tokens."""

import subprocess
import sys

import numpy as np
import pytest

from flatjax.diagnosis.text import Document
from harness.data import text
from harness.data.text import Shares

from .processes import EXPERIMENTS

DOCUMENTS = [
    Document(f"{module}/{i}.py", module, f"def {module}_{i}(x):\n    return x + {i}\n" * 3)
    for module in ("json", "email", "http", "xml", "ctypes", "logging")
    for i in range(12)
]
SHARES = Shares(held_out=0.3, transfer=0.4, seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(DOCUMENTS, 300)


def test_every_file_is_in_one_part_and_a_module_is_new_as_a_whole():
    parts = text.split(DOCUMENTS, SHARES)
    assert sorted(each for part in parts.values() for each in part) == sorted(DOCUMENTS)
    modules = {part: {each.module for each in parts[part]} for part in parts}
    assert not modules["transfer"] & modules["train"]
    assert modules["held_out"] <= modules["train"]


def test_a_file_stays_in_its_part_whatever_else_there_is():
    whole, some = text.split(DOCUMENTS, SHARES), text.split(DOCUMENTS[::2], SHARES)
    for part, documents in some.items():
        assert set(documents) <= set(whole[part])
    assert text.split(DOCUMENTS, SHARES._replace(seed=2)) != whole


def test_shares_are_those_of_files_and_of_modules():
    many = [Document(f"{m}/{i}", str(m), "x") for m in range(400) for i in range(20)]
    parts = text.split(many, Shares(0.05, 0.1))
    assert abs(len(parts["transfer"]) / len(many) - 0.1) < 5 * np.sqrt(0.1 * 0.9 / 400)
    rest = len(many) - len(parts["transfer"])
    assert abs(len(parts["held_out"]) / rest - 0.05) < 5 * np.sqrt(0.05 * 0.95 / rest)


def test_modules_are_held_out_by_name():
    parts = text.split(DOCUMENTS, SHARES, ["xml", "http"])
    assert {each.module for each in parts["transfer"]} == {"xml", "http"}
    with pytest.raises(SystemExit, match="curses, of which the text has no file"):
        text.split(DOCUMENTS, SHARES, ["xml", "curses"])


def test_a_part_without_text_is_an_error():
    with pytest.raises(SystemExit, match="held_out and transfer got none"):
        text.split(DOCUMENTS, Shares(0.0, 0.0))


def test_the_standard_library_is_split_into_known_modules_without_its_tests():
    documents = text.standard_library()
    assert {"json", "argparse", "asyncio"} <= {each.module for each in documents}
    assert all({"test", "tests", "site-packages"}.isdisjoint(each.name.split("/")) for each in documents)
    assert min(map(len, text.split(documents, Shares()).values())) > 5


def test_files_and_folders_are_read_and_what_is_no_text_is_left_out(tmp_path):
    for name in ("a/one.py", "a/b/two.py", "three.py", "four.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}, Größe\n", encoding="utf-8")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.py").write_text("\n")
    of_folder = text.read([tmp_path], "*.py")
    assert [(each.name, each.module) for each in of_folder] == [
        ("a/b/two.py", "a"),
        ("a/one.py", "a"),
        ("three.py", "three"),
    ]
    several = text.read([tmp_path / "a", tmp_path / "four.txt"], "*.py")
    assert [each.name for each in several] == ["a/b/two.py", "a/one.py", "four.txt"]
    with pytest.raises(SystemExit, match="which is not there"):
        text.read([tmp_path / "five.txt"])
    with pytest.raises(SystemExit, match=r"--text has .*bytes\.py, which is not UTF-8 at byte 0, 0xff"):
        text.read([tmp_path / "a", tmp_path / "bytes.py"])


def test_tokens_decode_to_the_text_whatever_its_bytes(tokenizer):
    strange = Document("strange", "strange", "λ = ‖W‖²\r\n\t日本 \x00 🙂 ")
    (number, end) = len(tokenizer.encode(strange.text).ids), tokenizer.token_to_id(text.END_OF_TEXT)
    tokens = text.encode(tokenizer, [strange, DOCUMENTS[0]])
    assert tokenizer.decode(tokens[:number].tolist()) == strange.text
    assert tokenizer.decode(tokens[number + 1 : -1].tolist()) == DOCUMENTS[0].text
    assert tokens[number] == tokens[-1] == end
    assert tokens.max() < tokenizer.get_vocab_size() == 300


def test_a_tokenizer_is_trained_once_and_always_the_same(tokenizer, tmp_path):
    file = tmp_path / "tokenizer.json"
    assert text.cached_tokenizer(file, DOCUMENTS, 300).to_str() == tokenizer.to_str()
    assert text.cached_tokenizer(file, DOCUMENTS[:1], 260).to_str() == tokenizer.to_str()


@pytest.mark.parametrize("vocab_size", [100, 4000])
def test_a_vocabulary_that_the_text_cannot_fill_is_an_error(vocab_size):
    with pytest.raises(SystemExit, match=rf"--vocab-size is {vocab_size}"):
        text.train_tokenizer(DOCUMENTS, vocab_size)


def test_every_token_but_the_first_is_the_label_of_one_window():
    tokens = np.arange(32, dtype=np.int32)
    windows = text.windows(tokens, 5)
    assert windows.shape == (6, 6)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), tokens[1:31])
    np.testing.assert_array_equal(windows[:, :-1], windows[:, 1:] - 1)
    assert len(text.windows(tokens, 31)) == 1
    with pytest.raises(SystemExit, match="no window"):
        text.windows(tokens, 32)


def test_rows_are_taken_evenly_from_first_to_last():
    rows = np.arange(20)[:, None]
    np.testing.assert_array_equal(text.evenly(rows, 3)[:, 0], [0, 10, 19])
    np.testing.assert_array_equal(text.evenly(rows, 50), rows)


@pytest.mark.parametrize("script", ["diagnose_llm", "train_lm"])
def test_without_the_extra_the_error_says_what_to_install(script):
    blocked = f"import sys; sys.modules['tokenizers'] = None; sys.path.insert(0, {str(EXPERIMENTS)!r}); import {script}"
    ended = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert "pip install 'flatjax[llm]'" in ended.stderr.splitlines()[-1]
