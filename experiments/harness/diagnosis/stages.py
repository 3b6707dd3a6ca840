"""How a diagnosis goes on: in stages, each reading units one by one, with several parts that take up what was read.

A part is a state, how a unit changes it, and what is made of it in the end, so that streaming, saving and resuming are
written here once. The state is on disk after every few units: what is killed goes on from there, to the same numbers.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from harness.checkpoints import checkpointer, load_latest
from harness.progress import Progress
from harness.runs import Record

State = Any
"""A tree of arrays."""


class Part(NamedTuple):
    """One thing that is measured."""

    init: Callable[[], State]
    update: Callable[[State, Any], State]
    """With a unit; the old state may be gone."""
    finish: Callable[[State], Record]


class Stage(NamedTuple):
    """Parts that read the same units."""

    name: str
    unit: str
    """Of which progress counts `num_units`."""
    num_units: int
    read: Callable[[int], Any]
    parts: Mapping[str, Part]


class Done(NamedTuple):
    """What a stage has come to."""

    states: dict[str, State]
    seconds: dict[str, np.ndarray]
    """Of each part and unit, "reading" among the parts; the first unit after a start has compilation in it."""


def run_stage(folder: Path, stage: Stage, save_every: int, progress: Progress) -> Done:
    """From where it was left to its end."""
    names = ["reading", *stage.parts]
    start = {
        "states": {name: part.init() for name, part in stage.parts.items()},
        "seconds": {name: np.full(stage.num_units, np.nan) for name in names},
    }
    with checkpointer(folder / stage.name) as checkpoints:
        done, state = load_latest(checkpoints, start)
        progress.spared(stage.unit, max(done, 0))
        states, seconds = state["states"], {name: np.array(each) for name, each in state["seconds"].items()}
        for index in range(max(done, 0), stage.num_units):
            unit, seconds["reading"][index] = _timed(stage.read, index)
            for name, part in stage.parts.items():
                states[name], seconds[name][index] = _timed(part.update, states[name], unit)
            number = index + 1
            if number % save_every == 0 or number == stage.num_units:
                checkpoints.save(number, {"states": states, "seconds": seconds})
            progress.done(stage.unit, note=f"{stage.name} {number}/{stage.num_units}")
    return Done(states, seconds)


def usual_seconds(seconds: np.ndarray) -> float:
    """Of a unit that nothing is compiled for."""
    return float(np.median(seconds[1:] if len(seconds) > 1 else seconds))


def seconds_of(done: Done, stage: Stage) -> dict[str, tuple[float, float]]:
    """Of reading and of each part, on all units, without compilation; and how much longer it took with it."""
    seconds = {}
    for name, each in done.seconds.items():
        computing = usual_seconds(each) * stage.num_units
        seconds[name] = computing, max(0.0, float(each.sum()) - computing)
    return seconds


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - started
