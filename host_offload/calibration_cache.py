"""Keeps calibrations between runs, as small JSON files in the user's cache folder.

Knows what machine this is and how a calibration is written down, not what was timed. A file is
believed only if it is for this machine and this work, every number in it is possible, and its
SHA-256 is the one that `write` put into it.
"""

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib.version

from host_offload.calibration import SIZES, Calibration, Curve
from host_offload.host_compute import compiler_options
from host_offload.memory import host_memory_bytes
from host_offload.processor import (
    has_matrix_units,
    has_wide_vectors,
    multiplies_bfloat16,
    processor_name,
)
from host_offload.whole_file import write_whole_file

# Part of every key: raise it when the file's fields change, or what they mean.
FORMAT = 2
VARIABLE = "MOE_JAX_CACHE"
_MOST_BYTES = 1 << 16
_NUMBERS = ("transfer", "link_latency", "host_launch", "read_rate", "spent")
_MAY_BE_ZERO = ("link_latency", "host_launch")
_LONGEST_SECONDS = 1e6
_HIGHEST_RATE = 1e16

Key = Mapping[str, Any]


def cache_folder() -> Path:
    """Where calibrations are kept.

    In the folder that the environment variable MOE_JAX_CACHE names, else in moe_jax under
    XDG_CACHE_HOME, else under ~/.cache. Raises OSError if there is no home folder either.
    """
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).expanduser().absolute() / "calibration"
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # relative ones are to be ignored, says the standard
        return given / "moe_jax" / "calibration"
    try:
        return Path.home() / ".cache" / "moe_jax" / "calibration"
    except RuntimeError as error:
        raise OSError(f"there is no home folder; set {VARIABLE} to a folder") from error


def machine_key() -> dict[str, Any]:
    """What a calibration depends on besides the work itself; JSON values."""
    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": processor_name(),
        "matrix_units": has_matrix_units(),
        "wide_vectors": has_wide_vectors(),
        "bfloat16_vectors": multiplies_bfloat16(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(host_memory_bytes() / 2**30),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "compiler_options": compiler_options(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def file_name(key: Key) -> str:
    """The name of the file, in the cache folder, that a calibration with this key is kept in."""
    return f"{_sha256(_plain(key))[:24]}.json"


def read(path: Path, key: Key) -> Calibration | None:
    """Returns the calibration that is kept for a key, or None if there is no file.

    Raises ValueError, saying what is wrong, for a file that cannot be used.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror or error})") from error
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON, or not all of it ({error})") from error
    if not isinstance(content, dict):
        raise ValueError("it holds no object")
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {content.get('format')!r:.40}, not {FORMAT}")
    _check_key(content.get("key"), _plain(key))
    _check_fields("the file", content, {"format", "key", "calibration", "sha256"})
    calibration = _calibration(content["calibration"])
    if content["sha256"] != _content(key, calibration)["sha256"]:
        raise ValueError("it was changed after it was written: its SHA-256 is another")
    return calibration


def write(path: Path, key: Key, calibration: Calibration) -> None:
    """Keeps a calibration: written aside, flushed to the disk, then renamed.

    Raises OSError if the folder cannot be made or written.
    """
    text = json.dumps(_content(key, calibration), indent=1) + "\n"
    write_whole_file(path, text.encode())


def _content(key: Key, calibration: Calibration) -> dict[str, Any]:
    content = {"format": FORMAT, "key": _plain(key), "calibration": _record(calibration)}
    return content | {"sha256": _sha256(content)}


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _plain(key: Key) -> dict[str, Any]:
    """A key as it comes back from JSON."""
    return json.loads(json.dumps(dict(key)))


def _check_key(found: Any, wanted: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError("it does not say what it was measured on")
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"it was measured with {name} {found.get(name)!r:.80}, not {wanted.get(name)!r:.80}"
            )


def _record(calibration: Calibration) -> dict[str, Any]:
    fields = dict(vars(calibration))
    for name in ("host", "device"):
        fields[name] = dict(vars(fields[name]))
    return fields


def _calibration(record: Any) -> Calibration:
    numbers = set(_NUMBERS)
    _check_fields("calibration", record, numbers | {"sizes", "host", "device", "work_bytes"})
    if record["sizes"] != list(SIZES):
        raise ValueError(f"sizes holds {record['sizes']!r:.80}, not {list(SIZES)}")
    if type(record["work_bytes"]) is not int or not 1 <= record["work_bytes"] <= 1 << 48:
        raise ValueError("work_bytes must be a whole number of at least 1")
    for name in _NUMBERS:
        most = _HIGHEST_RATE if name == "read_rate" else _LONGEST_SECONDS
        _check_number(name, record[name], most, may_be_zero=name in _MAY_BE_ZERO)
    return Calibration(
        sizes=SIZES,
        host=_curve("host", record["host"]),
        device=_curve("device", record["device"]),
        work_bytes=record["work_bytes"],
        **{name: float(record[name]) for name in _NUMBERS},
    )


def _curve(name: str, record: Any) -> Curve:
    _check_fields(name, record, {"seconds", "p90", "measured"})
    for field, values in record.items():
        if not isinstance(values, list) or len(values) != len(SIZES):
            raise ValueError(f"{name}.{field} is no list of {len(SIZES)} values")
    for field in ("seconds", "p90"):
        for value in record[field]:
            _check_number(f"{name}.{field}", value, _LONGEST_SECONDS)
        if any(a > b for a, b in itertools.pairwise(record[field])):
            raise ValueError(f"{name}.{field} falls")
    if not all(isinstance(value, bool) for value in record["measured"]):
        raise ValueError(f"{name}.measured holds something besides true and false")
    if any(a > b for a, b in zip(record["seconds"], record["p90"], strict=True)):
        raise ValueError(f"{name}.p90 lies below the median")
    return Curve(
        seconds=tuple(map(float, record["seconds"])),
        p90=tuple(map(float, record["p90"])),
        measured=tuple(record["measured"]),
    )


def _check_fields(name: str, record: Any, wanted: set[str]) -> None:
    if not isinstance(record, dict) or set(record) != wanted:
        raise ValueError(f"{name} must have the fields {', '.join(sorted(wanted))}")


def _check_number(name: str, value: Any, most: float, may_be_zero: bool = False) -> None:
    # Nothing lies between bounds that is not finite.
    is_number = type(value) in (int, float) and 0 <= value <= most
    if not is_number or (value == 0 and not may_be_zero):
        raise ValueError(f"{name} holds {value!r:.40}, no number that can be measured")
