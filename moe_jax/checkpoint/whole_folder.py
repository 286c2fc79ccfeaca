"""A folder that appears whole or not at all; knows nothing of what is in it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from host_offload.interrupts import hold_interrupts


def check_free(folder: Path) -> None:
    """Raises ValueError unless a folder may be created here: absent or empty, parent present."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot save to {folder}: it is a file; name a new or empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"cannot save to {folder}: it is not empty; name a new or empty folder")
    if not folder.parent.is_dir():
        raise ValueError(f"cannot save to {folder}: create the folder {folder.parent} first")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder to write into; it takes the name `folder` when the block succeeds.

    The files reach the disk before the rename. An error or an interrupt in the block removes
    everything; a process that is killed leaves a hidden `.NAME.partial-...` beside, never `NAME`.

    Raises:
      ValueError: see `check_free`.
    """
    folder = folder.resolve()
    check_free(folder)
    aside = folder.parent / f".{folder.name}.partial-{uuid.uuid4().hex}"
    try:
        aside.mkdir()
        yield aside
        for path in (*aside.rglob("*"), aside):
            _flush(path)
        aside.rename(folder)
        _flush(folder.parent)
    finally:
        with hold_interrupts():
            if aside.exists():
                shutil.rmtree(aside)


def _flush(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
