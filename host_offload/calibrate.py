"""Measures how fast this machine computes on the host, copies over the link and computes on the
device.

Knows arrays and functions of them, not what they mean.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from host_offload.calibration import Timing, fit_line, timing_of
from host_offload.host_compute import as_device, as_host, compiler_options, on_host
from host_offload.memory import MemoryKind, sharding
from host_offload.rounded_products import jit_rounded, rounding_pays

Clock = Callable[[], float]

_ASSUMED_CACHE = 64 << 20


class TimeBox:
    """Seconds that may be spent."""

    def __init__(self, seconds: float, clock: Clock = time.perf_counter):
        self.seconds = seconds
        self.clock = clock
        self._start = clock()

    @property
    def spent(self) -> float:
        """Seconds since the box was opened."""
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Seconds until the box is spent; negative after that."""
        return self.seconds - self.spent


def seconds_of(
    function: Callable[[], Any],
    repeats: int = 5,
    clock: Clock = time.perf_counter,
    pick: Callable[[list[float]], float] = median,
) -> float:
    """Wall-clock seconds of a call, its results awaited: the median, or what else is picked.

    The first call is not timed.
    """
    jax.block_until_ready(function())
    return pick([_once(function, clock) for _ in range(repeats)])


def time_beside(
    function: Callable[[int], Any],
    baseline: Callable[[int], Any],
    box: TimeBox,
    *,
    seconds: float = 0.1,
    repeats: tuple[int, int] = (3, 25),
    untimed: int = 1,
) -> Timing:
    """Times what a call takes beyond a baseline; they alternate, so that noise meets both.

    Both are given the number of the call, to rotate over inputs.

    Args:
      box: once it is spent, a single repeat will do.
      seconds: repeats past the fewest go on for this long.
      repeats: the fewest and the most.
      untimed: how many calls of each come first. All but one are left out when they take longer
        than ten times `seconds`.
    """
    clock, start = box.clock, box.clock()
    for number in range(untimed):
        if number and clock() - start > 10 * seconds:
            break
        for call in (function, baseline):
            jax.block_until_ready(call(number))
    start = clock()
    times: list[float] = []
    while len(times) < repeats[1]:
        number = untimed + len(times)
        with_work = _once(lambda number=number: function(number), clock)
        times.append(with_work - _once(lambda number=number: baseline(number), clock))
        if box.left <= 0 or (len(times) >= repeats[0] and clock() - start > seconds):
            break
    return timing_of(times)


def _once(function: Callable[[], Any], clock: Clock) -> float:
    start = clock()
    jax.block_until_ready(function())
    return clock() - start


def measure_in_time(
    tasks: Mapping[Any, Callable[[], Timing | None]], essential: int, box: TimeBox
) -> dict[Any, Timing]:
    """Runs tasks in their order while the next, if as long as the longest yet, ends in time.

    The first `essential` ones run whatever they take. A task that returns None decided itself that
    it would take too long.
    """
    done: dict[Any, Timing] = {}
    longest = 0.0
    for number, (name, task) in enumerate(tasks.items()):
        if number >= essential and box.left < longest:
            break
        start = box.spent
        timing = task()
        longest = max(longest, box.spent - start)
        if timing is not None:
            done[name] = timing
    return done


def cache_bytes() -> int:
    """Bytes of the processor's last-level caches together; 64 MiB where nothing tells."""
    largest: dict[str, int] = {}
    level = 0
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        try:
            here = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
        except (OSError, ValueError):
            continue
        if here < level or not size.endswith("K"):
            continue
        if here > level:
            level, largest = here, {}
        largest[shared] = int(size[:-1]) << 10
    return sum(largest.values()) or _ASSUMED_CACHE


def random_arrays(
    shapes: Sequence[tuple[int, ...]], dtype: jax.typing.DTypeLike, kind: MemoryKind
) -> tuple[jax.Array, ...]:
    """Small random numbers in one memory kind, for timing; a few values over and over."""
    values = (np.random.default_rng(0).standard_normal(1 << 16, np.float32) * 0.02).astype(dtype)
    return tuple(jax.device_put(np.resize(values, shape), sharding(kind)) for shape in shapes)


def _add_one(x: jax.Array) -> jax.Array:
    return x + 1


def measure_transfers(
    groups: Sequence[Sequence[Sequence[jax.Array]]], box: TimeBox
) -> tuple[float, float]:
    """Returns the latency of the link and the seconds that one item takes on it, in a program.

    Two sizes are timed: next to nothing, and a whole group.

    Args:
      groups: equally many items in each group, all of equal sizes, each a sequence of arrays in
        pinned host memory. Calls rotate over the groups.
    """
    fetch = jax.jit(as_device, compiler_options=compiler_options())
    idle = jax.jit(_add_one, compiler_options=compiler_options())
    on_device, on_host = (
        jax.device_put(np.zeros(8, np.float32), sharding(kind))
        for kind in ("device", "pinned_host")
    )
    baseline = lambda _: idle(on_device)
    start = time_beside(lambda _: fetch([(on_host,)]), baseline, box, seconds=0.05).median
    rotate = lambda i: fetch([tuple(item) for item in groups[i % len(groups)]])
    # Memory that the process never had before is slow to be had, which the first calls pay for.
    whole = time_beside(rotate, baseline, box, untimed=4)
    return fit_line((0, len(groups[0])), (start, whole.median))


def measure_host_launch(box: TimeBox) -> float:
    """Seconds for the round trip of a nearly empty host call, beyond those of its program."""
    x = jax.device_put(np.zeros(8, np.float32), sharding("device"))
    options = compiler_options()
    hosted = jax.jit(lambda x: on_host(lambda x: as_host(x) + 1, x), compiler_options=options)
    plain = jax.jit(_add_one, compiler_options=options)
    return time_beside(lambda _: hosted(x), lambda _: plain(x), box, seconds=0.05).median


def measure_product_rate(dtype: jax.typing.DTypeLike, repeats: int = 5) -> float:
    """Operations per second at which the device multiplies a large weight with 512 columns."""
    weight, columns = random_arrays([(8192, 2048), (2048, 512)], dtype, "device")
    product = lambda result, a, b: jax.lax.dot(a, b, preferred_element_type=result)
    if rounding_pays(dtype):
        multiply = jit_rounded(functools.partial(product, dtype))
    else:
        multiply = jax.jit(
            functools.partial(product, np.float32), compiler_options=compiler_options()
        )
    operations = 2 * weight.size * columns.shape[1]
    return operations / seconds_of(lambda: multiply(weight, columns), repeats)


def measure_read_rate(
    size: int = 1 << 29,
    kind: MemoryKind = "device",
    repeats: int = 5,
    beside: Sequence[jax.Array] = (),
    pick: Callable[[list[float]], float] = median,
) -> float:
    """Bytes per second at which memory of a kind is read by the processor beside it.

    The sum of a large array: by a device program or, for "pinned_host", by a host computation.
    Arrays in host memory, given as `beside`, are brought over the link in the same program, and
    their bytes count. The median of the repeats' seconds counts, or what else is picked of them.
    """
    array = jax.device_put(np.ones(size // 4, np.float32), sharding(kind))
    if kind == "device":
        total = jax.jit(lambda x, beside: (x.sum(), as_device(beside)))
    else:
        total = jax.jit(
            lambda x, beside: (on_host(lambda x: x.sum(), x), as_device(beside)),
            compiler_options=compiler_options(),
        )
    read = array.nbytes + sum(other.nbytes for other in beside)
    return read / seconds_of(lambda: total(array, tuple(beside)), repeats, pick=pick)
