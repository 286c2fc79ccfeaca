"""Writes a file so that a reader finds the old content or the new one, and never a part.

Knows bytes and folders, not what is in them.
"""

import contextlib
import os
import tempfile
from pathlib import Path


def write_whole_file(path: Path, content: bytes) -> None:
    """Writes aside, flushes to the disk, renames; makes the folder if it is missing.

    An error or an interrupt leaves nothing behind. Raises OSError if the folder cannot be made or
    written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)  # mkstemp lets nobody else read it
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
