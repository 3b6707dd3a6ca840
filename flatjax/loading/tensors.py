"""The tensors of a folder of safetensors files, which stay on the disk until they are read one by one."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flatjax.core.optional import optional
from flatjax.loading.files import listed, read_object, shown
from flatjax.loading.headers import Entry, read_header, sample

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of some files by name, each read when it is asked for.

    Raises:
        ValueError: a file is malformed.
    """

    def __init__(self, files: Sequence[Path]):
        self._safetensors = optional("safetensors")
        self.files = files
        self.headers = {file: read_header(file) for file in files}
        self.entries: dict[str, Entry] = {
            name: each for header in self.headers.values() for name, each in header.items()
        }
        self._opened: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._slices(name)[:]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        """The name that an error gives them."""
        first, last = self.files[0], self.files[-1]
        return str(first) if first == last else f"{first} to {last.name}"

    def close(self) -> None:
        """Lets the files go until they are read again."""
        self._opened.clear()

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two matrices of the same shape are equal, compared some rows at a time."""
        a, b, size = self._slices(first), self._slices(second), self.entries[first].shape[0]
        parts = (slice(start, min(start + 1024, size)) for start in range(0, size, 1024))
        return all(np.array_equal(a[part], b[part], equal_nan=True) for part in parts)

    def digest(self, names: Mapping[str, str]) -> str:
        """The digest that tensors are known by, under the keys of their names, whichever files they are in.

        It is made of their dtypes, their shapes and a sample of their bytes.
        """
        found = hashlib.sha256()
        for key in sorted(names):
            entry = self.entries[names[key]]
            found.update(repr((key, entry.dtype, entry.shape)).encode())
            found.update(sample(entry))
        return found.hexdigest()

    def is_newer_than(self, other: "Tensors") -> bool:
        """Whether every file of these was written after every file of the others, and not just in one copy."""
        first = min(os.stat(file).st_mtime for file in self.files)
        last = max(os.stat(file).st_mtime for file in other.files)
        return first - last > _SECONDS_OF_A_COPY

    def _slices(self, name: str) -> Any:
        file = self.entries[name].file
        try:
            if file not in self._opened:
                self._opened[file] = self._safetensors.safe_open(file, "numpy")
            return self._opened[file].get_slice(name)
        except self._safetensors.SafetensorError as error:
            raise ValueError(f"{name} cannot be read from {file}: {error}") from error


_SECONDS_OF_A_COPY = 2.0


def stored(folder: Path) -> list[Tensors]:
    """Finds what of a folder is there whole: the one file, the parts that the index names, or both.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: either is malformed.
    """
    found, single, index = [], folder / _SINGLE, folder / _INDEX
    if os.path.exists(single):
        found.append(Tensors([single]))
    if os.path.exists(index):
        files = _read_index(index)
        names = sorted(set(files.values()))
        absent = [name for name in names if not os.path.isfile(folder / name)]
        if not absent:
            parts = Tensors([folder / name for name in names])
            _check_fits(index, files, parts)
            found.append(parts)
        elif not found:
            raise FileNotFoundError(f"{folder} has no {listed(absent)} that {_INDEX} names")
    if not found:
        raise FileNotFoundError(f"{folder} has no {_SINGLE} or {_INDEX}; other formats are not read")
    return found


def _read_index(index: Path) -> dict[str, str]:
    """Reads from the index which file each tensor is in."""
    files = read_object(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"weight_map in {index} is {shown(files)}, wanted the file of each tensor by its name")
    for name, file in files.items():
        if not isinstance(file, str):
            raise ValueError(f"weight_map in {index} has {shown(file)} for {name}, wanted the name of a file")
    elsewhere = sorted({file for file in files.values() if Path(file).name != file or file == ".."})
    if elsewhere:
        raise ValueError(f"weight_map in {index} names files outside of its folder: {listed(elsewhere)}")
    return files


def _check_fits(index: Path, files: Mapping[str, str], parts: Tensors) -> None:
    found = {(name, file.name) for file, header in parts.headers.items() for name in header}
    problems = [f"{name} is not in {file}" for name, file in sorted(set(files.items()) - found)]
    problems += [f"{name} in {file} is not in the index" for name, file in sorted(found - set(files.items()))]
    if problems:
        raise ValueError(f"{index} does not fit its files: {listed(problems)}")
