"""A run's checkpoints are kept by their steps, and each is written wholly or not at all."""

from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp


def checkpointer(folder: Path, *, keep: int | None = 2) -> ocp.training.Checkpointer:
    """Open a folder of checkpoints for a `with` statement.

    It keeps as many of the last checkpoints as it is told, or all of them if that is None.
    """
    policies = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        folder.resolve(),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def load_latest(checkpoints: ocp.training.Checkpointer, state: Any) -> tuple[int, Any]:
    """Load the last checkpoint's step and state, which has the structure of the one given.

    Without a checkpoint, return the state given and −1.
    """
    if not checkpoints.latest:
        return -1, state
    return checkpoints.latest.step, checkpoints.load(checkpoints.latest, abstract_state=state)


def load_part(folder: Path, step: int, part: Any) -> Any:
    """Load only a part of the checkpoint of a step.

    `part` is a tree of arrays or shapes, with their shardings, placed as in the state's structure. Other branches are
    not read.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = True  # before it is entered, after which it is fixed
    with context:
        return ocp.load(folder.resolve() / str(step), abstract_state=part)
