"""The tensors of a folder of safetensors files, which stay on the disk until they are read one by one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flatjax.loading.optional import optional

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Tensors(Mapping[str, Any]):
    """By name, what has `get_shape()`, `get_dtype()` and slices that are read when they are taken.

    Raises:
        FileNotFoundError: no safetensors, or not all that the index names.
        ValueError: tensors are not in the file in which the index says that they are, or not in the index.
    """

    def __init__(self, folder: Path):
        safe_open = optional("safetensors").safe_open
        index = _read_index(folder)
        files = sorted(set(index.values())) if index is not None else [_SINGLE]
        absent = [file for file in files if not (folder / file).is_file()]
        if absent:
            wanted = f"that {_INDEX} names" if index is not None else f"or {_INDEX}; other formats are not read"
            raise FileNotFoundError(f"{folder} has no {', '.join(absent)} {wanted}")
        opened = {file: safe_open(folder / file, "numpy") for file in files}
        self._files = {name: opened[file] for file in files for name in opened[file].keys()}  # noqa: SIM118
        if index is not None:
            found = {(name, file) for file in files for name in opened[file].keys()}  # noqa: SIM118
            problems = [f"{name} is not in {file}" for name, file in sorted(set(index.items()) - found)]
            problems += [f"{name} in {file} is not in the index" for name, file in sorted(found - set(index.items()))]
            if problems:
                raise ValueError(f"{_INDEX} in {folder} does not fit its files: {'; '.join(problems)}")

    def __getitem__(self, name: str) -> Any:
        return self._files[name].get_slice(name)

    def __iter__(self):
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def are_equal(self, first: str, second: str) -> bool:
        """Two matrices, compared some rows at a time."""
        a, b = self[first], self[second]
        if a.get_shape() != b.get_shape():
            return False
        size = a.get_shape()[0]
        parts = (slice(start, min(start + 1024, size)) for start in range(0, size, 1024))
        return all(np.array_equal(a[part], b[part]) for part in parts)


def _read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, if there are several."""
    if not (folder / _INDEX).is_file():
        return None
    index = json.loads((folder / _INDEX).read_text())["weight_map"]
    elsewhere = sorted({file for file in index.values() if Path(file).name != file})
    if elsewhere:
        raise ValueError(f"{_INDEX} names files outside of {folder}: {', '.join(elsewhere)}")
    return index
