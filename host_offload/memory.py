"""The one door between host and device memory.

Knows memory kinds, byte counts and budgets; nothing about models.
"""

import ctypes
import ctypes.util
import os
import re
from pathlib import Path
from typing import Literal, no_type_check

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

MemoryKind = Literal["device", "pinned_host"]

# The environment variable that tells XLA:GPU how many GB it may pin, where that is not 64.
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"

# Where Linux says what a process may use: its control group, and their folders by version.
_OWN_GROUP = Path("/proc/self/cgroup")
_GROUPS = {
    "": (Path("/sys/fs/cgroup"), "memory.max"),
    "memory": (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
}

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}iB": 1 << 10 * (i + 1) for i, prefix in enumerate("KMGT")}
_UNITS |= {f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("KMGT")}


@no_type_check  # checks its own argument, with errors that a user can read
def parse_bytes(amount: str | int) -> int:
    """Reads a number of bytes: an int, or text such as "24GiB", "512 MB" or "1.5 GiB".

    Raises ValueError for anything else, and for amounts that are not positive.
    """
    if isinstance(amount, int) and not isinstance(amount, bool):
        number = amount
    else:
        text = amount if isinstance(amount, str) else ""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        units = {unit.lower(): size for unit, size in _UNITS.items()}
        if not match or match[2].lower() not in units:
            raise ValueError(
                f"a memory size must be a number of bytes or text like '24GiB' or '512MB', "
                f"got {amount!r}"
            )
        number = int(float(match[1]) * units[match[2].lower()])
    if number <= 0:
        raise ValueError(f"a memory size must be positive, got {amount!r}")
    return number


def format_bytes(amount: int) -> str:
    """Writes a number of bytes with a binary unit, such as "1.50 GiB"."""
    size, unit = float(amount), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"


def sharding(kind: MemoryKind, device: jax.Device | None = None) -> SingleDeviceSharding:
    """Where an array goes: the given or first device, in its own memory or pinned on its host."""
    return SingleDeviceSharding(device or jax.devices()[0], memory_kind=kind)


def host_device() -> jax.Device:
    """The processor as a device of its own, beside the accelerator where there is one.

    Raises ValueError where JAX was told to leave it out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise ValueError(
            "JAX was started without its CPU backend; add cpu to the environment variable "
            f"JAX_PLATFORMS, for instance JAX_PLATFORMS={jax.default_backend()},cpu"
        ) from error


def to_host(tree, device: jax.Device | None = None):
    """Moves a tree of arrays to the pinned host memory of the given or first device."""
    return jax.device_put(tree, sharding("pinned_host", device))


def to_device(tree):
    """Starts moving a tree of arrays to device memory; returns before it arrives."""
    return jax.device_put(tree, sharding("device"))


def zeros(shape: tuple[int, ...], dtype, kind: MemoryKind) -> jax.Array:
    """An array of zeros in one memory kind."""
    return jax.device_put(np.zeros(shape, dtype), sharding(kind))


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, where the C library is glibc.

    XLA:CPU allocates the temporaries of a program anew at every execution. Given back to the
    kernel each time, they come back as pages that must be zeroed one by one, which costs a prefill
    a tenth of its time.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.util.find_library("c")
    mallopt = getattr(ctypes.CDLL(libc), "mallopt", None) if libc else None
    if mallopt is not None:
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc accepts
        mallopt(trim_threshold, 1 << 30)


def host_memory_bytes() -> int:
    """The machine's physical memory, or less where a container or a batch system allows less."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_group_limits()])


def _group_limits() -> list[int]:
    """The limits of this process's control group and of those around it, where there are any."""
    lines = _OWN_GROUP.read_text().splitlines() if _OWN_GROUP.exists() else []
    files = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers in _GROUPS:
            base, name = _GROUPS[controllers]
            # In a container the path may be one of the machine's, which is not to be seen here.
            parts = path.strip("/").split("/")
            files += [base.joinpath(*parts[:depth], name) for depth in range(len(parts) + 1)]
    told = [file.read_text().strip() for file in files if file.is_file()]
    return [int(text) for text in told if text.isdigit()]


def device_memory_bytes() -> int:
    """What the first device may allocate; on the CPU backend that is what the host has.

    Raises ValueError where the device does not tell.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return host_memory_bytes()
    told = device.memory_stats() or {}
    if "bytes_limit" not in told:
        raise ValueError(
            f"{device} does not tell how much memory it has; give device_memory=, for instance "
            "device_memory='20GiB'"
        )
    return told["bytes_limit"]
