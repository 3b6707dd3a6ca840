"""Checkpoints of a run: the last two, by their steps, each written wholly or not at all."""

from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp


def checkpointer(folder: Path) -> ocp.training.Checkpointer:
    """To be used in a `with` statement."""
    return ocp.training.Checkpointer(
        folder.resolve(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )


def load_latest(checkpoints: ocp.training.Checkpointer, state: Any) -> tuple[int, Any]:
    """The last checkpoint's step and state, which has the structure of the one given; that one and −1 if none is."""
    if not checkpoints.latest:
        return -1, state
    return checkpoints.latest.step, checkpoints.load(checkpoints.latest, abstract_state=state)
