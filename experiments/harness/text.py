"""Read local text as tokens: what is trained on, files held out, and whole modules held out.

A file is held out by chance, while its neighbours are trained on. A module, which is a top-level folder or file, is
held out with all its files, so that its topic is new: the loss there is transfer. Both follow from a hash of the name
and a seed.
"""

import hashlib
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from flatjax.loading.optional import optional

optional("tokenizers")  # whose error says what to install

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

Part = Literal["train", "held_out", "transfer"]
"""`held_out` is of modules that are trained on, `transfer` is of others."""

END_OF_TEXT = "<|endoftext|>"


class Document(NamedTuple):
    """A document is a file of text.

    Its module is the topmost folder below the one given, or the file itself where there is none.
    """

    name: str
    module: str
    text: str


class Shares(NamedTuple):
    """Shares of the text are held out, and drawn by a seed."""

    held_out: float = 0.05
    """Share of the files that is held out."""
    transfer: float = 0.1
    """Share of the modules that is held out."""
    seed: int = 0


def standard_library() -> list[Document]:
    """Read Python's standard library, but no tests, tables or help texts.

    No one wrote the tables and help texts as programs.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    documents = read([folder], "*.py")
    return [
        each
        for each in documents
        if not _LEFT_OUT & set(Path(each.name).parts) and not each.module.startswith("_sysconfigdata")
    ]


_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}


def read(paths: Sequence[Path], pattern: str = "*") -> list[Document]:
    """Read the files given, and those matching the pattern in folders given, where what is not UTF-8 is left out.

    If several folders are given, each of them is the topmost folder of its files.

    Raises:
        SystemExit: there is no such file or folder, or a file that is given is not UTF-8.
    """
    documents = []
    for path in paths:
        if not path.exists():
            raise SystemExit(f"--text has {path}, which is not there")
        files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
        for file in files:
            if _LEFT_OUT_OF_ALL & set(file.parts[len(path.parts) :]) or not file.is_file():
                continue
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                if file != path:
                    continue
                raise SystemExit(
                    f"--text has {file}, which is not UTF-8 at byte {error.start}, {error.object[error.start]:#04x}: "
                    "convert it, or leave it out"
                ) from error
            name = file.relative_to(path if path.is_dir() and len(paths) == 1 else path.parent)
            documents.append(Document(name.as_posix(), Path(name.parts[0]).stem, text))
    return [each for each in documents if each.text.strip()]


_LEFT_OUT_OF_ALL = {"site-packages", "dist-packages", "__pycache__", ".git"}
"""These folders are not read. The first may hold other people's packages in the standard library's folder."""


def part_of(document: Document, shares: Shares, modules: Sequence[str] = ()) -> Part:
    """Return the part of a document by its name only, which stays the same whatever else there is.

    `modules` are held out by name.
    """
    is_new = document.module in modules if modules else _chance("module", document.module, shares) < shares.transfer
    if is_new:
        return "transfer"
    return "held_out" if _chance("file", document.name, shares) < shares.held_out else "train"


def _chance(kind: str, name: str, shares: Shares) -> float:
    """Return a number that is uniform in [0, 1)."""
    digest = hashlib.sha256(f"{shares.seed}/{kind}/{name}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split(documents: Iterable[Document], shares: Shares, modules: Sequence[str] = ()) -> dict[Part, list[Document]]:
    """Return every part of the documents; none of them is empty.

    Raises:
        SystemExit: a part is empty, or there is no module of a name given.
    """
    documents = list(documents)
    if unknown := set(modules) - {each.module for each in documents}:
        raise SystemExit(f"--modules has {', '.join(sorted(unknown))}, of which the text has no file")
    parts = {part: [each for each in documents if part_of(each, shares, modules) == part] for part in get_args(Part)}
    if empty := [part for part in parts if not parts[part]]:
        raise SystemExit(
            f"of {len(documents)} files of text {' and '.join(empty)} got none: give more files, in several folders, "
            "or larger shares, or --modules by name, or another --split-seed; cut a file that is large"
        )
    return parts


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Train a tokenizer of byte pairs, so that no text has an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((each.text for each in documents), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(
            f"the text has byte pairs for {tokenizer.get_vocab_size()} tokens, --vocab-size is {vocab_size}: wanted at "
            f"least {_BYTES_AND_END}, and no more than the text has"
        )
    return tokenizer


_BYTES_AND_END = 257


def saved_or_trained_tokenizer(file: Path, documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of the file, or train one that is not saved there yet."""
    return Tokenizer.from_file(str(file)) if file.exists() else train_tokenizer(documents, vocab_size)


def save_tokenizer(tokenizer: Tokenizer, file: Path) -> None:
    """Save the tokenizer wholly or not at all."""
    draft = file.with_suffix(".draft")
    tokenizer.save(str(draft))
    draft.replace(file)


def cached_tokenizer(file: Path, documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of the file, or train one and save it there."""
    tokenizer = saved_or_trained_tokenizer(file, documents, vocab_size)
    if not file.exists():
        save_tokenizer(tokenizer, file)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[Document]) -> np.ndarray:
    """Return all documents as tokens, one after another, each with the token of an end behind it."""
    end = [tokenizer.token_to_id(END_OF_TEXT)]
    encoded = tokenizer.encode_batch([each.text for each in documents], add_special_tokens=False)
    return np.concatenate([np.array(each.ids + end, np.int32) for each in encoded])


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Cut tokens into windows (n, context + 1).

    Inputs are all but the last column, labels all but the first. Each label is in a single window.
    """
    number = (len(tokens) - 1) // context
    if number < 1:
        raise SystemExit(f"{len(tokens)} tokens of text are no window of --context {context} and a label")
    return np.lib.stride_tricks.sliding_window_view(tokens, context + 1)[: number * context : context]


def evenly(rows: np.ndarray, number: int) -> np.ndarray:
    """Return as many of the rows as asked for, or all, evenly from first to last."""
    return rows[np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)]


def corpus(documents: Mapping[Part, Sequence[Document]], tokenizer: Tokenizer, context: int) -> dict[Part, np.ndarray]:
    """Return the windows of each part."""
    return {part: windows(encode(tokenizer, documents[part]), context) for part in documents}
