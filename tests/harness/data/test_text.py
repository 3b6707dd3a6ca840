"""What of a text is trained on and what is not, and its tokens."""

import numpy as np
import pytest

from flatjax.run.text import Document, standard_library
from harness.data import text
from harness.data.text import Shares

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
    documents = standard_library()
    assert {"json", "argparse", "asyncio"} <= {each.module for each in documents}
    assert all({"test", "tests", "site-packages"}.isdisjoint(each.name.split("/")) for each in documents)
    assert min(map(len, text.split(documents, Shares()).values())) > 5


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
