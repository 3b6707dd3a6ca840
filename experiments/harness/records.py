"""A measurement leaves a record of itself and of the machine it was made on."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def temporary_memory(function: Callable, arguments: tuple[Any, ...]) -> int:
    """Return the bytes that a compiled call needs beside its arguments and results."""
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the {jax.default_backend()} backend of jax does not say what memory it takes")
    return analysis.temp_size_in_bytes


def write_record(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, with the machine and versions they were measured on."""
    device = jax.devices()[0]
    machine = {"jax": jax.__version__, "platform": device.platform, "device": device.device_kind}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(machine | {"processor": platform.machine(), "rows": rows}, indent=2) + "\n")
    print(f"on {device.device_kind}, jax {jax.__version__}; the record is {file}")
