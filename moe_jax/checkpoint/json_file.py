"""Reads a JSON object from a file that is not trusted; knows no field of it."""

import json
from pathlib import Path

MAX_BYTES = 1 << 28


def read_json_object(file: Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises:
      ValueError: the file is missing, larger than 256 MiB, not UTF-8 JSON, or not an object.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing or not a file")
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file} has {size} bytes; at most {MAX_BYTES} are read as JSON")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value
