"""Read local files of text, and cut their tokens into the windows that a model reads."""

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """A document is a file of text.

    Its module is the topmost folder below the one given, or the file itself where there is none.
    """

    name: str
    module: str
    text: str


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
