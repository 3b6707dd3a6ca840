"""A run's record is a folder with its configuration, its metrics (a line per measurement), and its summary."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def as_json(record: Record) -> Record:
    """Return what JSON would read back, with lists for tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in record.items()}


class RunFolder:
    """A run's folder has `config.json`, `metrics.jsonl` and `summary.json`, and is never overwritten in silence.

    Nothing is written before there is something to keep, so that what fails before leaves nothing behind.
    """

    def __init__(self, folder: Path, config: Record, *, resume: bool):
        self.folder, self._config = folder, config
        """The folder may not be there yet: `path` is."""
        self._config_file, self._metrics_file = folder / "config.json", folder / "metrics.jsonl"
        if self._config_file.exists():
            self._check_goes_on(resume)
        self.records = self._whole_records()
        self.keep(lambda record: True)

    @property
    def path(self) -> Path:
        """Return the folder to write to, which is made if it is not there."""
        if not self._config_file.exists():
            # No configuration is no run: it is written first.
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._config_file, self._config)
        return self.folder

    def _check_goes_on(self, resume: bool) -> None:
        if not resume:
            raise SystemExit(f"{self.folder} holds a run: continue it with --resume, or choose another --name")
        recorded, config = json.loads(self._config_file.read_text()), self._config
        if recorded != config:
            changes = [key for key in recorded | config if recorded.get(key) != config.get(key)]
            differences = ", ".join(f"{key} {recorded.get(key)!r} -> {config.get(key)!r}" for key in changes)
            raise SystemExit(
                f"{self.folder} holds a run of another configuration ({differences}): choose another --name"
            )

    def append(self, record: Record) -> None:
        """Add a line to `metrics.jsonl`, at once."""
        record = json.loads(_to_json(record))
        self.records.append(record)
        with (self.path / self._metrics_file.name).open("a") as file:
            file.write(_to_json(record) + "\n")

    def keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drop the records that are not `wanted`: those measured after the last checkpoint are measured again."""
        self.records = [record for record in self.records if wanted(record)]
        text = "".join(_to_json(record) + "\n" for record in self.records)
        if self._metrics_file.exists():
            _replace(self._metrics_file, text)

    def summarise(self, summary: Record) -> None:
        _write(self.path / "summary.json", summary)

    def _whole_records(self) -> list[Record]:
        """Return what a killed run has left: its last line may be cut short."""
        if not self._metrics_file.exists():
            return []
        return [
            json.loads(line) for line in self._metrics_file.read_text().splitlines(keepends=True) if line[-1] == "\n"
        ]


def _to_json(record: Record) -> str:
    """Convert to JSON, which has no NaN and no infinity: null and a string stand for them."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else str(value)
        return {key: strict(each) for key, each in value.items()} if isinstance(value, dict) else value

    return json.dumps(strict(record))


def _write(file: Path, record: Record) -> None:
    _replace(file, json.dumps(record, indent=2) + "\n")


def _replace(file: Path, text: str) -> None:
    """Write the whole file or nothing."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)
