"""What the machine has: its device, and the memory that a process may use on its host."""

import os
from dataclasses import dataclass
from pathlib import Path

from host_offload.memory import device_memory_bytes, host_memory_bytes

# Where the kernel says what a container may use: version 2 and version 1 of control groups.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


@dataclass(frozen=True)
class Device:
    """jax's first device; on the CPU backend its memory is that of the host."""

    platform: str
    kind: str
    bytes: int


def device() -> Device:
    """Asks jax, which then holds the device: for a process that ends soon."""
    import jax  # noqa: PLC0415

    first = jax.devices()[0]
    return Device(first.platform, first.device_kind, device_memory_bytes())


def host_bytes() -> int:
    """The machine's memory, or less where this process runs in a container that may use less."""
    found = [host_memory_bytes()]
    for file in _LIMITS:
        text = file.read_text().strip() if file.exists() else "max"
        if text.isdigit():
            found.append(int(text))
    return min(found)


def allow_pinning() -> None:
    """Lets XLA pin all of the host's memory in processes that start from now on, not just 64 GB."""
    os.environ.setdefault(_PINNED_LIMIT, str(max(host_bytes() // 10**9, 64)))
