"""Records of checkpoints are known by a digest of what is in them, and by the name they were last given.

A checkpoint that was trained on is therefore measured anew, and one that was moved is not. One whose old weights come
back has its old numbers.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flatjax.run.records import Record, RunFolder


class Called(NamedTuple):
    """A checkpoint is called by a name."""

    name: str
    step: int | None
    digest: str


class Diagnoses:
    """Diagnoses are the records of a run by checkpoint and part."""

    def __init__(self, run: RunFolder):
        self.run = run

    def part(self, digest: str, part: str) -> Record | None:
        return next(
            (each for each in self.run.records if (each["checkpoint"], each["part"]) == (digest, part)),
            None,
        )

    def add(self, digest: str, part: str, numbers: Mapping[str, Any], **more: Any) -> None:
        self.run.append({"checkpoint": digest, "part": part, "numbers": numbers, **more})

    def is_whole(self, digest: str) -> bool:
        """Say whether nothing is left to measure."""
        return self.part(digest, "cost") is not None

    def called(self) -> list[Called]:
        """Return the names that checkpoints were last given."""
        return [
            Called(each["name"], each["step"], each["checkpoint"]) for each in self.run.records if each["part"] == _NAME
        ]

    def changed(self, checkpoints: list[Called]) -> list[str]:
        """Return the names that were of another checkpoint before."""
        before = {each.name: each.digest for each in self.called()}
        return [each.name for each in checkpoints if before.get(each.name, each.digest) != each.digest]

    def call(self, checkpoints: list[Called]) -> None:
        """Give names, each to one checkpoint; what these were called before is forgotten."""
        whole = [each for each in checkpoints if self.is_whole(each.digest)]
        names, digests = {each.name for each in checkpoints}, {each.digest for each in checkpoints}
        others = [each for each in self.called() if each.name not in names and each.digest not in digests]
        if self.called() != [*others, *whole]:
            self.run.keep(lambda record: record["part"] != _NAME)
            for each in [*others, *whole]:
                self.run.append({"checkpoint": each.digest, "part": _NAME, "name": each.name, "step": each.step})

    def whole(self) -> Iterator[tuple[Called, dict[str, Record]]]:
        """Return all checkpoints with a name, in the order of steps, with the numbers of each part."""
        for each in sorted(self.called(), key=lambda each: -1 if each.step is None else each.step):
            records = [record for record in self.run.records if record["checkpoint"] == each.digest]
            yield each, {record["part"]: record["numbers"] for record in records if record["part"] != _NAME}


_NAME = "name"
