"""Names of layers: in which order they are read, and how they are shown."""

from collections.abc import Sequence


def in_forward_order(paths: Sequence[str]) -> list[str]:
    """From the input to the head, by the names in `flatjax.models`."""

    def place(path: str) -> list[tuple[int, str]]:
        return [(int(key), "") if key.isdigit() else (_RANKS.get(key, len(_RANKS)), key) for key in path.split("/")]

    return sorted(paths, key=place)


_RANKS = {
    name: rank
    for rank, names in enumerate(
        [["input"], ["stem", "patch_embedding"], ["layers", "blocks"], ["attention", "first"],
         ["query", "second", "gate", "up"], ["key", "shortcut", "down"], ["value"], ["out", "output"], ["head"]]
    )
    for name in names
}  # fmt: skip


def short(path: str) -> str:
    """The path as figures and tables show it, without the word kernel at its end."""
    return path.removesuffix("/kernel")
