"""Measures how fast this machine computes on the host, copies over the link and computes on the
device.

Knows arrays and functions of them, not what they mean.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import numpy as np

from host_offload.memory import MemoryKind, sharding, to_device


def seconds_of(function: Callable[[], Any], repeats: int = 5) -> float:
    """The median wall-clock seconds of a call, its results awaited; the first call is not timed."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return median(times)


def random_arrays(
    shapes: Sequence[tuple[int, ...]], dtype: jax.typing.DTypeLike, kind: MemoryKind
) -> tuple[jax.Array, ...]:
    """Small random numbers in one memory kind, for timing."""
    draw = np.random.default_rng(0).standard_normal
    return tuple(
        jax.device_put((draw(shape, np.float32) * 0.02).astype(dtype), sharding(kind))
        for shape in shapes
    )


def measure_link(arrays: Sequence[jax.Array]) -> float:
    """Seconds to bring these pinned host arrays to the device."""
    return seconds_of(lambda: to_device(tuple(arrays)))


def measure_read_rate(size: int = 1 << 29) -> float:
    """Bytes per second at which a device program reads memory: the sum of a large array."""
    array = to_device(np.ones(size // 4, np.float32))
    total = jax.jit(lambda x: x.sum())
    return array.nbytes / seconds_of(lambda: total(array))
