"""A diagnosis goes on in stages; each reads batch after batch, and its parts take up what was read.

A part is a first state, how a batch changes it, and what the last state says. Streaming, saving and resuming are
therefore written here once. The state is on disk at the end of a stage and, within a stage, as often as the time asks
for it. A killed run goes on from there, to the same numbers.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flatjax.diagnosis.reading import Text
from flatjax.run.checkpoints import checkpointer, load_latest
from flatjax.run.progress import Progress
from flatjax.run.records import Record

State = Any
"""A state is a tree of arrays."""


class Part(NamedTuple):
    """A part is one thing that is measured."""

    init: Callable[[], State]
    update: Callable[[State, Any], State]
    """Update the state by what was read of a batch; the old state may be gone."""
    finish: Callable[[State], Record]


class Stage(NamedTuple):
    """A stage holds parts that read the same batches."""

    name: str
    kind: str
    """Kind of progress, which counts sequences."""
    text: Text
    read: Callable[[int], Any]
    parts: Mapping[str, Part]


class Done(NamedTuple):
    """A stage has come this far."""

    states: dict[str, State]
    seconds: dict[str, np.ndarray]
    """Seconds of each part and batch, with "reading" among the parts; the first after a start has compilation in it."""


class Saves:
    """Saves keep the states of stages on the disk, so that at most a given time of work is lost, or a batch.

    Args:
        folder: folder of all stages; it is made when something is saved.
        seconds: seconds of work that may be lost.
        before: function that is called before anything is saved.
    """

    def __init__(self, folder: Path, seconds: float, before: Callable[[], object] = lambda: None):
        self.folder, self.seconds, self._before = folder, seconds, before
        self._since = time.monotonic()

    def latest(self, stage: str, start: State) -> tuple[int, State]:
        """Return how many batches are done, and the state after them, with the structure of the one given."""
        if not (self.folder / stage).is_dir():
            return 0, start
        with checkpointer(self.folder / stage) as checkpoints:
            done, state = load_latest(checkpoints, start)
        return max(done, 0), state

    def is_due(self, next_seconds: float) -> bool:
        """Say whether too much would be lost in the next batch, if it takes so long."""
        return bool(time.monotonic() - self._since + next_seconds > self.seconds)

    def save(self, stage: str, done: int, state: State) -> None:
        self._before()
        with checkpointer(self.folder / stage) as checkpoints:
            checkpoints.save(done, state)
        self._since = time.monotonic()


def run_stage(stage: Stage, saves: Saves, progress: Progress) -> Done:
    """Run a stage from where it stopped to its end."""
    names, text = ["reading", *stage.parts], stage.text
    start = {
        "states": {name: part.init() for name, part in stage.parts.items()},
        "seconds": {name: np.full(text.num_batches, np.nan) for name in names},
    }
    done, state = saves.latest(stage.name, start)
    progress.were_done({stage.kind: sum(map(text.size, range(done)))})
    states, seconds = state["states"], {name: np.array(each) for name, each in state["seconds"].items()}
    for index in range(done, text.num_batches):
        read, seconds["reading"][index] = _timed(stage.read, index)
        for name, part in stage.parts.items():
            states[name], seconds[name][index] = _timed(part.update, states[name], read)
        number = index + 1
        if number == text.num_batches or saves.is_due(sum(each[index] for each in seconds.values())):
            saves.save(stage.name, number, {"states": states, "seconds": seconds})
        progress.done(stage.kind, text.size(index), f"{stage.name} {number}/{text.num_batches}")
    return Done(states, seconds)


def usual_seconds(seconds: np.ndarray) -> float:
    """Return the seconds of a batch that nothing is compiled for."""
    return float(np.median(seconds[1:] if len(seconds) > 1 else seconds))


def seconds_of(done: Done, stage: Stage) -> dict[str, tuple[float, float]]:
    """Return the seconds of reading and of each part on all batches, and how much more compilation took.

    The former are without compilation.
    """
    seconds = {}
    for name, each in done.seconds.items():
        computing = usual_seconds(each) * stage.text.num_batches
        seconds[name] = computing, max(0.0, float(each.sum()) - computing)
    return seconds


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - started
