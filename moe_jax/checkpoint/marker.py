"""The file that tells our folder from others and lists what must be in it.

Knows no model and no Orbax: names, shapes, files, sizes and checksums. The marker is not trusted.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from moe_jax.checkpoint.json_file import read_json_object

MARKER = "moe_jax_checkpoint.json"
FORMAT = "moe-jax checkpoint"
VERSION = 1


class Part(NamedTuple):
    """One Orbax checkpoint among several: shapes by array, [bytes, CRC-32] by file."""

    arrays: dict[str, tuple[int, ...]]
    files: dict[str, tuple[int, int]]


def part_folder(number: int) -> str:
    """Where a part lies inside the folder."""
    return f"weights/{number:05d}"


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Bytes and CRC-32 of every file below a folder, by its path relative to the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _size_and_checksum(path) for path in files}


def check_contents(folder: Path, part: Part) -> None:
    """Raises ValueError, naming the file, if any file of a part has changed since it was saved."""
    for name, saved in part.files.items():
        if _size_and_checksum(folder / name) != saved:
            raise ValueError(
                f"{folder / name} is damaged: its checksum is not the one saved; restore the "
                "folder from a copy or save it again"
            )


def write_marker(folder: Path, dtype: str, parts: Sequence[Part]) -> None:
    """Writes the marker of a folder whose parts are complete."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "parts": [part._asdict() for part in parts],
    }
    (folder / MARKER).write_text(json.dumps(content), encoding="utf-8")


def read_marker(folder: Path) -> tuple[Part, ...]:
    """Reads the marker and checks that every file it lists is there in its full length.

    Raises:
      ValueError: the marker is broken or of another format or version; a file is missing or has
        another size.
    """
    marker = folder / MARKER
    content = read_json_object(marker)
    if content.get("format") != FORMAT:
        raise ValueError(f"{marker} has format {content.get('format')!r}, expected {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{marker} has version {content.get('version')!r}, this library reads {VERSION}; "
            "install the version of moe-jax that wrote it"
        )
    entries = content.get("parts")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{marker} is broken: it lists no parts")
    parts = tuple(_read_part(marker, entry) for entry in entries)
    for number, part in enumerate(parts):
        for name, (size, _) in part.files.items():
            file = folder / part_folder(number) / name
            if not file.is_file():
                raise ValueError(f"{file} is missing; {marker} lists it")
            if file.stat().st_size != size:
                raise ValueError(
                    f"{file} is truncated or damaged: it has {file.stat().st_size} bytes, "
                    f"{marker} says {size}"
                )
    return parts


def _read_part(marker: Path, entry: object) -> Part:
    """Checks one entry of the marker."""
    broken = ValueError(f"{marker} is broken: a part needs arrays with shapes, files with sizes")
    if not isinstance(entry, dict) or set(entry) != {"arrays", "files"}:
        raise broken
    arrays, files = entry["arrays"], entry["files"]
    if not isinstance(arrays, dict) or not isinstance(files, dict):
        raise broken
    if not all(map(_counts, arrays.values())):
        raise broken
    if not all(_counts(value) and len(value) == 2 for value in files.values()):
        raise broken
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{marker} lists {name!r}, which lies outside of its folder")
    return Part(
        {name: tuple(shape) for name, shape in arrays.items()},
        {name: (size, checksum) for name, (size, checksum) in files.items()},
    )


def _counts(value: object) -> bool:
    """Whether a JSON value is a list of whole numbers from 0 that fit 64 bits."""
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 63 for x in value)


def _size_and_checksum(file: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of one file."""
    buffer = np.empty(1 << 22, np.uint8).data
    size = checksum = 0
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            size += count
    return size, checksum
