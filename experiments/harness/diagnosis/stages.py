"""How a diagnosis goes on: in stages, each reading batch after batch, with parts that take up what was read.

A part is a state, how a batch changes it, and what is made of it in the end, so that streaming, saving and resuming are
written here once. The state is on disk after every few batches: what is killed goes on from there, to the same numbers.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from harness.checkpoints import checkpointer, load_latest
from harness.diagnosis.reading import Text
from harness.progress import Progress
from harness.runs import Record

State = Any
"""A tree of arrays."""


class Part(NamedTuple):
    """One thing that is measured."""

    init: Callable[[], State]
    update: Callable[[State, Any], State]
    """With what was read of a batch; the old state may be gone."""
    finish: Callable[[State], Record]


class Stage(NamedTuple):
    """Parts that read the same batches."""

    name: str
    kind: str
    """Of progress, which counts sequences."""
    text: Text
    read: Callable[[int], Any]
    parts: Mapping[str, Part]


class Done(NamedTuple):
    """What a stage has come to."""

    states: dict[str, State]
    seconds: dict[str, np.ndarray]
    """Of each part and batch, "reading" among the parts; the first after a start has compilation in it."""


def run_stage(folder: Path, stage: Stage, save_every: int, progress: Progress) -> Done:
    """From where it was left to its end."""
    names, text = ["reading", *stage.parts], stage.text
    start = {
        "states": {name: part.init() for name, part in stage.parts.items()},
        "seconds": {name: np.full(text.num_batches, np.nan) for name in names},
    }
    with checkpointer(folder / stage.name) as checkpoints:
        done, state = load_latest(checkpoints, start)
        progress.spared(stage.kind, sum(map(text.size, range(max(done, 0)))))
        states, seconds = state["states"], {name: np.array(each) for name, each in state["seconds"].items()}
        for index in range(max(done, 0), text.num_batches):
            read, seconds["reading"][index] = _timed(stage.read, index)
            for name, part in stage.parts.items():
                states[name], seconds[name][index] = _timed(part.update, states[name], read)
            number = index + 1
            if number % save_every == 0 or number == text.num_batches:
                checkpoints.save(number, {"states": states, "seconds": seconds})
            progress.done(stage.kind, text.size(index), f"{stage.name} {number}/{text.num_batches}")
    return Done(states, seconds)


def usual_seconds(seconds: np.ndarray) -> float:
    """Of a batch that nothing is compiled for."""
    return float(np.median(seconds[1:] if len(seconds) > 1 else seconds))


def seconds_of(done: Done, stage: Stage) -> dict[str, tuple[float, float]]:
    """Of reading and of each part, on all batches, without compilation; and how much longer it took with it."""
    seconds = {}
    for name, each in done.seconds.items():
        computing = usual_seconds(each) * stage.text.num_batches
        seconds[name] = computing, max(0.0, float(each.sum()) - computing)
    return seconds


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - started
