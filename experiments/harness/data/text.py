"""Read local text as tokens: what is trained on, files held out, and whole modules held out.

A file is held out by chance, while its neighbours are trained on. A module, which is a top-level folder or file, is
held out with all its files, so that its topic is new: the loss there is transfer. Both follow from a hash of the name
and a seed.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from flatjax.core.optional import optional
from flatjax.run.text import Document, windows

optional("tokenizers", use="work on language models needs", extras="experiments,llm")
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

Part = Literal["train", "held_out", "transfer"]
"""`held_out` is of modules that are trained on, `transfer` is of others."""

END_OF_TEXT = "<|endoftext|>"


class Shares(NamedTuple):
    """Shares of the text are held out, and drawn by a seed."""

    held_out: float = 0.05
    """Share of the files that is held out."""
    transfer: float = 0.1
    """Share of the modules that is held out."""
    seed: int = 0


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


def corpus(documents: Mapping[Part, Sequence[Document]], tokenizer: Tokenizer, context: int) -> dict[Part, np.ndarray]:
    """Return the windows of each part."""
    return {part: windows(encode(tokenizer, documents[part]), context) for part in documents}
