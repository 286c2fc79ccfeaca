"""What a machine does not allow, found before any weight is read.

Knows byte counts and the machine; nothing is worked around.
"""

import os

import jax

from host_offload.memory import PINNED_LIMIT, format_bytes, host_memory_bytes


def check_limits(device_bytes: int, host_bytes: int, *, driven: bool) -> None:
    """Raises ValueError if a model needs memory that the machine lacks, or that XLA may not pin.

    A driven layer's experts are in the memory of the CPU client, which nobody limits.
    """
    if not driven:
        _check_kind("pinned_host")
    if jax.default_backend() == "cpu":
        _check_shared_memory(device_bytes, host_bytes)
    elif jax.default_backend() == "gpu" and not driven:
        _check_pinned(host_bytes)


def _check_kind(kind: str) -> None:
    device = jax.devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if kind not in kinds:
        raise ValueError(
            f"{device} has no memory of kind {kind!r}, where experts would be kept, but "
            f"{', '.join(kinds)}; use executor='driven', or another backend or release of JAX"
        )


def _check_shared_memory(device_bytes: int, host_bytes: int) -> None:
    """On the CPU backend both budgets are of the same memory."""
    allowed = host_memory_bytes()
    if device_bytes + host_bytes > allowed:
        raise ValueError(
            f"this process may use {format_bytes(allowed)} of memory, which on the CPU backend "
            f"device and host share, and the model needs {format_bytes(device_bytes)} on the one "
            f"and {format_bytes(host_bytes)} on the other; give host_dtype='int8' with a smaller "
            "device_memory=, lower max_tokens= or max_seqs=, or use a smaller model"
        )


def _check_pinned(needed: int) -> None:
    """XLA:GPU pins 64 GB at most unless told otherwise before it starts."""
    given = os.environ.get(PINNED_LIMIT, "64")
    try:
        limit = int(given) * 10**9
    except ValueError as error:
        raise ValueError(
            f"the environment variable {PINNED_LIMIT} must be a whole number of GB, got {given!r}"
        ) from error
    if needed > limit:
        raise ValueError(
            f"{needed / 1e9:.0f} GB of experts go to pinned host memory, and XLA allows "
            f"{limit / 1e9:.0f} GB; set the environment variable {PINNED_LIMIT} to at least "
            f"{needed // 10**9 + 1} before starting Python"
        )
