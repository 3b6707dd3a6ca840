"""Read what a safetensors file says of its tensors before any of them is read, and check it against the file's size.

The safetensors library checks as much when it opens a file, but its errors name neither the file nor the tensor.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from flatjax.loading.files import existing, listed, parse_object, shown


class Entry(NamedTuple):
    """The place of a tensor in a file, and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """The number of its first byte in the file."""
    stop: int


def read_header(file: Path) -> dict[str, Entry]:
    """Reads the header of a file: its tensors by name.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is cut short, or is no safetensors file, or its tensors overlap, leave gaps or end beyond it.
    """
    size = existing(file).stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(_PREFIX), "little")
        if size < _PREFIX or length > size - _PREFIX:
            raise ValueError(f"{file} has {size} bytes, which is no safetensors file, or one that is cut short")
        header = parse_object(opened.read(length), f"the header of {file}")
    header.pop("__metadata__", None)
    first = _PREFIX + length
    problems = [problem for name, given in header.items() if (problem := _problem(name, given))]
    if not problems:
        problems = _misplaced(header, size - first)
    if problems:
        raise ValueError(f"the header of {file} is malformed: {listed(problems)}")
    return {
        name: Entry(file, given["dtype"], tuple(given["shape"]), *(first + each for each in given["data_offsets"]))
        for name, given in header.items()
    }


def sample(entry: Entry) -> bytes:
    """Reads a tensor's bytes; if it is large, only some, evenly spaced from first to last."""
    size = entry.stop - entry.start
    with entry.file.open("rb") as opened:
        if size <= _PIECES * _PIECE:
            opened.seek(entry.start)
            return opened.read(size)
        pieces = []
        for i in range(_PIECES):
            opened.seek(entry.start + i * (size - _PIECE) // (_PIECES - 1))
            pieces.append(opened.read(_PIECE))
    return b"".join(pieces)


def _problem(name: str, given: Any) -> str | None:
    """Says what is wrong with the entry of one tensor by itself."""
    if not isinstance(given, Mapping):
        return f"{name} is {shown(given)}, wanted an object"
    dtype, shape, offsets = given.get("dtype"), given.get("shape"), given.get("data_offsets")
    if not isinstance(dtype, str):
        return f"dtype of {name} is {shown(dtype)}, wanted a text"
    if not _are_counts(shape):
        return f"shape of {name} is {shown(shape)}, wanted a list of whole numbers"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets of {name} is {shown(offsets)}, wanted a first byte and one not before it"
    size = offsets[1] - offsets[0]
    if dtype in _BYTES and size != math.prod(shape) * _BYTES[dtype]:
        return f"{name} has {size} bytes, which are not those of {dtype} of shape {shown(tuple(shape))}"
    return None


def _misplaced(header: Mapping[str, Any], size: int) -> list[str]:
    """Lists tensors that do not lie one after another until the end."""
    problems, end, before = [], 0, "the header"
    for name, given in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = given["data_offsets"]
        if start != end:
            problems.append(f"{name} starts at byte {start}, but {before} ends at byte {end}")
        end, before = stop, name
    if end != size:
        problems.append(f"{before} ends at byte {end}, but the file has {size} bytes of tensors")
    return problems


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 2**63 for each in values)


_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""How many bytes a number of each dtype has."""

_PREFIX = 8
"""The number of bytes that say how long the header is."""

_PIECES, _PIECE = 32, 32_768
