"""Files of a checkpoint: those that have to be there, and JSON that has to be an object."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def existing(file: Path) -> Path:
    """Returns the file itself, if it is there.

    Raises:
        FileNotFoundError: it is not there, or it is a folder.
    """
    if os.path.isdir(file):
        raise FileNotFoundError(f"{file} is a folder, wanted a file")
    if not os.path.isfile(file):  # which of a name that is none is False, where `Path.is_file` raises
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    return file


def read_object(file: Path) -> Json:
    """Reads the JSON object of a file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it holds anything else; or a key is there twice.
    """
    return parse_object(existing(file).read_bytes(), str(file))


def parse_object(content: bytes, source: str) -> Json:
    """Parses the JSON object that `source` holds."""

    def with_unique_keys(pairs: list[tuple[str, Any]]) -> Json:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
        return found

    try:
        found = json.loads(content.decode(), object_pairs_hook=with_unique_keys)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 at byte {error.start}, wanted a JSON object") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is no JSON object: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds {shown(found)}, wanted a JSON object")
    return found


def shown(value: Any) -> str:
    """Shows a value in an error: long ones are cut."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def listed(problems: Sequence[str]) -> str:
    """Lists what is wrong, one after another; if there is much, only the first."""
    more = len(problems) - _MOST_LISTED
    return "; ".join([*problems[:_MOST_LISTED], *([f"and {more} more"] if more > 0 else [])])


_LONGEST_SHOWN = 200
_MOST_LISTED = 20
