"""Find where a checkpoint lies: in a folder, or on a hub by its name."""

import os
from pathlib import Path

from flatjax.core.optional import optional


def find_folder(path_or_hub_name: str | Path, revision: str | None) -> Path:
    """Finds the folder given, or what the hub has of that name.

    Raises:
        FileNotFoundError: there is neither.
        ImportError: the extra `llm` is not installed.
        TypeError: it is neither a path nor a name.
        ValueError: a folder has no revisions.
    """
    if not isinstance(path_or_hub_name, str | Path):
        raise TypeError(
            f"path_or_hub_name is a {type(path_or_hub_name).__name__}, wanted a folder, or a name as "
            '"EleutherAI/pythia-70m"'
        )
    folder = Path(path_or_hub_name).expanduser()
    if os.path.isdir(folder):
        if revision is not None:
            raise ValueError(f"revision is {revision!r}, but {folder} is a folder, which holds one: leave it out")
        return folder
    name = str(path_or_hub_name)
    if isinstance(path_or_hub_name, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"there is no folder {name}")
    hub = optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # of the hub's own, or of the connection's
        raise FileNotFoundError(f"{name} is no folder here, and the hub gives none of this name: {error}") from error


_FILES = [
    "config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
]
