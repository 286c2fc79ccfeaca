"""How much shared memory a program may use on this GPU.

Knows compute capabilities, and no kernel.
"""

import jax

# Bytes per block, by compute capability (CUDA C++ programming guide, "Technical Specifications per
# Compute Capability"); what is missing here gets what all of them have.
SHARED_MEMORY = {"8.0": 163 << 10, "8.7": 163 << 10, "9.0": 227 << 10, "10.0": 227 << 10}
LEAST_SHARED_MEMORY = 99 << 10


def compute_capability() -> str | None:
    """Returns what the first device says of itself, such as "9.0"; None if it is no NVIDIA GPU."""
    return getattr(jax.devices()[0], "compute_capability", None)


def shared_memory() -> int:
    """Returns the bytes of shared memory that a program may use on the first device."""
    return SHARED_MEMORY.get(str(compute_capability()), LEAST_SHARED_MEMORY)
