"""Opening a model folder, and handing its weights over one by one into the memory chosen for each.

Knows no engine and no placement: the caller names a sharding for every array.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike

from moe_jax.checkpoint.huggingface import INDEX, SINGLE, open_hugging_face
from moe_jax.checkpoint.marker import MARKER
from moe_jax.checkpoint.orbax import open_orbax
from moe_jax.checkpoint.orbax import save_checkpoint as save_checkpoint
from moe_jax.checkpoint.targets import expected_targets as expected_targets
from moe_jax.config import ModelConfig


@runtime_checkable
class Checkpoint(Protocol):
    """A folder that was checked and found complete; no weight has been read yet."""

    @property
    def folder(self) -> Path:
        """Where config.json lies, and perhaps tokenizer and chat template."""
        ...

    @property
    def raw_config(self) -> Mapping[str, object]:
        """config.json as it stands."""
        ...

    @property
    def config(self) -> ModelConfig:
        """What the model's family made of config.json."""
        ...

    def weight_bytes(self, dtype: DTypeLike) -> int:
        """Bytes of all arrays once loaded in this dtype."""
        ...

    def load(
        self,
        dtype: DTypeLike,
        sharding: Callable[[str], jax.sharding.Sharding],
        receive: Callable[[str, jax.Array], None],
        progress: bool = False,
    ) -> None:
        """Reads every array of `expected_targets(config)` and hands it over once.

        Resident memory grows by the arrays handed over and at most some 500 MB (or one array, if
        that is larger) beside them.

        Args:
          dtype: floating; stored values are rounded to it.
          sharding: where an array goes, by its name; the memory kind says device or host.
          receive: takes each array with its name. On the CPU backend an array may share memory
            with the buffer it was read into; nobody else holds that buffer.
          progress: whether to show a progress bar in bytes.

        Raises:
          ValueError: a file changed or was damaged since the folder was opened.
        """
        ...


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens a Hugging Face folder or one written by `save_checkpoint`, and checks it.

    Raises:
      ValueError: no such folder, no known format, or anything in it that is missing, broken, of
        the wrong shape or dtype, or without a use; the message says what and where.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"there is no folder {folder}; checkpoints are not downloaded by name")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; name the folder that holds config.json")
    if (folder / MARKER).exists():
        return open_orbax(folder)
    if (folder / "config.json").exists():
        return open_hugging_face(folder)
    raise ValueError(
        f"{folder} is no checkpoint: looked for {MARKER} (saved by moe_jax), and for config.json "
        f"beside {SINGLE} or {INDEX} (Hugging Face)"
    )
