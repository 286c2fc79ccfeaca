"""What the machine has: its device, and how much of its host's memory may be pinned."""

import os
from dataclasses import dataclass

from host_offload.memory import PINNED_LIMIT, device_memory_bytes, host_memory_bytes


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


def allow_pinning() -> None:
    """Lets XLA pin all of the host's memory in processes that start from now on, not just 64 GB."""
    os.environ.setdefault(PINNED_LIMIT, str(max(host_memory_bytes() // 10**9, 64)))
