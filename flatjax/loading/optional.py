"""Packages that not every user needs, and the extras that bring them."""

import importlib
from typing import Any


def optional(name: str, *, use: str = "checkpoints are read with", extras: str = "llm") -> Any:
    """Import the module, or say how to get it.

    Args:
        name: of the module.
        use: what it is needed for, as the beginning of the sentence that ends with its name.
        extras: of flatjax, that bring it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{use} {name}, which is not here: pip install 'flatjax[{extras}]'") from error
