"""Import packages that only loading needs."""

import importlib
from typing import Any


def optional(name: str) -> Any:
    """Imports a module, or raises an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"checkpoints are read with {name}, which is not here: pip install 'flatjax[llm]'") from error
