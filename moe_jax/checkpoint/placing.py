"""Host buffers that enter a device without a copy, and the bar that shows how far loading is.

Knows no file format.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

ALIGNMENT = 64  # bytes; below it the CPU backend copies what it is given


def aligned_buffer(shape: tuple[int, ...], dtype: jnp.dtype) -> Float[np.ndarray, "..."]:
    """An uninitialised NumPy array whose first byte lies on a 64-byte boundary."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def place(buffer: Float[np.ndarray, "..."], sharding: jax.sharding.Sharding) -> jax.Array:
    """Puts a buffer into the memory that the sharding names, and waits until it is there.

    On the CPU backend the array may be the buffer itself, so nobody may write into it afterwards.
    """
    # Waiting keeps at most one buffer alive on its way to an accelerator.
    return jax.block_until_ready(jax.device_put(buffer, sharding))


def loading_bar(total: int, shown: bool) -> tqdm:
    """A progress bar in bytes."""
    return tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, unit_divisor=1024, disable=not shown
    )
