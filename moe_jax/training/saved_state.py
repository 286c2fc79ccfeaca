"""Keeps the state of a training run on disk, so that it can be taken up again; Orbax does the work.

Knows a folder and a state, not what is trained.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from moe_jax.training.step import State


class SavedStates:
    """The last states of a run; saving goes on in the background."""

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def newest(self, like: State) -> State | None:
        """The newest state that was saved whole; None if there is none yet.

        `like` has its shapes and types.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored: Any = self._manager.restore(step, args=ocp.args.StandardRestore(shapes))
        return restored

    def save(self, state: State) -> None:
        """Begins to save; returns once the state may be donated."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def close(self) -> None:
        """Waits until what was begun is on disk."""
        self._manager.close()
