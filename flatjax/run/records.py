"""A run's record is a folder with its configuration, its metrics (a line per measurement), and its summary."""

import dataclasses
import json
import math
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from flatjax.core import results

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """Turn a record, a result or a tuple of them into what strict JSON holds.

    Tuples with names become mappings, other tuples and arrays become lists, and paths become text. JSON has no NaN and
    no infinity: null stands for the one and "inf" or "-inf" for the other, of which `number` makes numbers again.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return str(value) if isinstance(value, Path) else results.plain(value)


def number(value: float | str | None) -> float:
    """Return the number that a record holds: NaN where it is null, and an infinity where it is named."""
    return math.nan if value is None else float(value)


class RunFolder:
    """A run's folder has `config.json`, `metrics.jsonl` and `summary.json`, and is never overwritten in silence.

    Nothing is written before there is something to keep, so that what fails before leaves nothing behind.
    """

    def __init__(self, folder: Path, config: Record, *, resume: bool):
        self.folder, self._config = folder, plain(config)
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
    return json.dumps(plain(record), allow_nan=False)


def _write(file: Path, record: Record) -> None:
    _replace(file, json.dumps(plain(record), indent=2, allow_nan=False) + "\n")


def _replace(file: Path, text: str) -> None:
    """Write the whole file or nothing."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)


def write_record(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows, with the machine and versions they were measured on."""
    device = jax.devices()[0]
    machine = {"jax": jax.__version__, "platform": device.platform, "device": device.device_kind}
    record = machine | {"processor": platform.machine(), "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(plain(record), indent=2, allow_nan=False) + "\n")
    print(f"on {device.device_kind}, jax {jax.__version__}; the record is {file}")
