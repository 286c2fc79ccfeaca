"""How long the device needs for a call, and how fast it can copy and multiply at all.

Knows nothing about kernels. A program makes several calls on different arguments, so that caches
hold nothing of the next call's; programs are dispatched one behind the other without waiting, so
that launching one hides behind the last.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from kernel_bench.cases import Arrays

_MOST_IN_FLIGHT = 32  # beyond it the runtime may make the host wait


@dataclass(frozen=True)
class Timing:
    """What a program took.

    Attributes:
      seconds: median device seconds of one call.
      spread: difference of the slowest and fastest sample, relative to the median.
      host_bound: dispatching took as long as computing, so the device may be faster than this.
    """

    seconds: float
    spread: float
    host_bound: bool


def reason(error: BaseException) -> str:
    """Returns an error in one line: its kind and the start of its message."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def compile_programs(
    functions: Mapping[str, Callable[..., Any]], arrays: Arrays, budget: int, workers: int = 8
) -> dict[str, Any]:
    """Compiles one program per function, several at once; timings must wait until all are done.

    Args:
      functions: called with the arrays as keywords.
      budget: a program that needs more temporary device bytes is refused.

    Returns:
      By name an executable that takes (shared, calls), or the reason why there is none.
    """

    def program(function: Callable[..., Any]) -> Callable[..., Any]:
        inner = jax.jit(lambda shared, call: function(**shared, **call))

        def run(shared: dict[str, Any], calls: list[dict[str, Any]]) -> list[Any]:
            # The barrier keeps the compiler from preparing what is shared once for all calls.
            return [inner(*jax.lax.optimization_barrier((shared, call))) for call in calls]

        return run

    def compiled(lowered: Any) -> Any:
        if isinstance(lowered, str):
            return lowered
        try:
            executable = lowered.compile()
            temporary = executable.memory_analysis().temp_size_in_bytes
        except Exception as error:  # whatever a compiler raises is a finding here
            return reason(error)
        if temporary > budget:
            return f"needs {temporary / 2**30:.1f} GiB of temporary memory"
        return executable

    lowered: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            lowered[name] = jax.jit(program(function)).lower(*arrays)
        except Exception as error:
            lowered[name] = reason(error)
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(lowered, pool.map(compiled, lowered.values()), strict=True))


def measure(
    program: Callable[..., Any],
    arrays: Arrays,
    sample_seconds: float = 0.01,
    samples: int = 5,
) -> Timing:
    """Times a compiled program; seconds are those of one of its calls.

    Args:
      program: takes (shared, calls).
      sample_seconds: programs are dispatched back to back for about this long per sample.
    """
    jax.block_until_ready(program(*arrays))  # loads the module
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    once = time.perf_counter() - start
    repeats = int(min(max(sample_seconds / once, 1), _MOST_IN_FLIGHT))
    totals, dispatches, result = [], [], None
    for _ in range(samples if once < 0.1 else 2):
        start = time.perf_counter()
        for _ in range(repeats):
            result = program(*arrays)  # earlier results are freed as the device gets to it
        dispatches.append(time.perf_counter() - start)
        jax.block_until_ready(result)
        totals.append(time.perf_counter() - start)
    middle = statistics.median(totals)
    return Timing(
        seconds=middle / (repeats * len(arrays.calls)),
        spread=(max(totals) - min(totals)) / middle,
        host_bound=repeats > 1 and statistics.median(dispatches) > 0.9 * middle,
    )


def healthy() -> bool:
    """Returns whether the device still computes; a kernel's bad access ends it for the process."""
    try:
        jax.block_until_ready(jnp.ones(8) + 1)
    except Exception:  # whatever it is, the answer is no
        return False
    return True


@jax.jit
def _worst(actual: jax.Array, expected: jax.Array) -> jax.Array:
    expected = expected.astype(jnp.float32)
    off = jnp.abs(actual.astype(jnp.float32) - expected).max()
    return off / jnp.maximum(jnp.abs(expected).max(), 1e-30)


def difference(actual: jax.Array, expected: jax.Array) -> float:
    """Returns the largest difference relative to the largest expected magnitude; NaN: infinity."""
    worst = float(_worst(actual, expected))
    return worst if worst == worst else float("inf")


def copy_rate(size: int) -> float:
    """Returns bytes per second, read plus written, of copying an array of `size` bytes."""
    source = jax.random.bits(jax.random.key(0), (size // 4,), jnp.uint32)
    seconds = []
    # An elementwise kernel and the driver's copy; whichever is faster is the device's rate.
    for copy in (lambda x: x + jnp.uint32(1), jnp.copy):
        program = jax.jit(lambda shared, calls, copy=copy: [copy(shared["source"])])
        seconds.append(measure(program, Arrays({"source": source}, [{}]), 0.02, 7).seconds)
    return 2 * source.nbytes / min(seconds)


def dense_rate(side: int) -> float:
    """Returns floating-point operations per second of a square bfloat16 matrix product."""
    keys = jax.random.split(jax.random.key(1))
    left, right = (jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys)

    def multiply(shared: dict[str, Any], calls: list[Any]) -> list[Any]:
        return [jnp.matmul(shared["left"], shared["right"])]

    arrays = Arrays({"left": left, "right": right}, [{}])
    return 2 * side**3 / measure(jax.jit(multiply), arrays, 0.05, 7).seconds


def device_rates(tiny: bool = False) -> dict[str, float]:
    """Returns the measured limits of the device: copied bytes and bfloat16 operations a second."""
    return {
        "copy_bytes_per_second": copy_rate(2**20 if tiny else 2**30),
        "dense_flops_per_second": dense_rate(256 if tiny else 8192),
    }
