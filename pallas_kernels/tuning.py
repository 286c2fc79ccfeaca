"""Tables of measured tile sizes: one JSON file per operation, implementation and kind of device.

Knows neither kernels nor what a tile means; the numbers are handed on by name.
"""

import functools
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jax


def table_name(implementation: str, device_kind: str) -> str:
    """Returns the file name of a table, such as "gpu_nvidia_h200.json"."""
    return f"{implementation}_{re.sub('[^a-z0-9]+', '_', device_kind.lower())}.json"


def bucket(count: int) -> int:
    """Returns the next power of two: batches vary, and tables should hit all the same."""
    return 1 << max(count - 1, 0).bit_length()


def device_kind() -> str:
    """Returns what the first device calls itself, such as "NVIDIA H200"."""
    return jax.devices()[0].device_kind


@functools.cache
def read_table(operation: str, file: str) -> Mapping[str, Mapping[str, Any]]:
    """Returns the entries of a table that ships with the package; empty if there is none.

    Raises:
      ValueError: the file is no table.
    """
    path = files("pallas_kernels") / operation / "tiles" / file
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a table of tiles ({error!r}); make it anew with scripts/tune.py"
        ) from error


def find_tiles(
    operation: str, implementation: str, key: str, kind: str | None = None
) -> Mapping[str, int] | None:
    """Returns the measured tiles for a key on this kind of device, or None if none were measured.

    Args:
      operation: "paged_attention" or "grouped_matmul".
      implementation: "gpu" or "tpu".
      key: what the kernel was measured at; each kernel says how it writes its keys.
      kind: the kind of device; None: the first device's.

    Raises:
      ValueError: the table cannot be read.
    """
    table = read_table(operation, table_name(implementation, kind or device_kind()))
    entry = table.get(key)
    return entry["tiles"] if entry else None
