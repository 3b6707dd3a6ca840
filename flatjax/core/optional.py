"""Import packages that not every user needs, and name the extras that bring them."""

import importlib
from typing import Any


def optional(name: str, *, use: str = "checkpoints are read with", extras: str = "llm") -> Any:
    """Imports a module, or raises an error that says how to get it.

    Args:
        name: what the module is called.
        use: what it is needed for, as the beginning of the sentence that ends with its name.
        extras: the extras of flatjax that bring it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{use} {name}, which is not here: pip install 'flatjax[{extras}]'") from error
