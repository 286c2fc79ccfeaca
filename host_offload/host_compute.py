"""Runs a function on the host CPU inside a device program.

On a GPU the call becomes an asynchronous host execution that independent device work runs beside;
on the CPU backend it is part of the program like everything else.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import compute_on as _compute_on

# jax 0.10 has the function form as compute_on2; later releases call it compute_on.
_offload: Any = getattr(_compute_on, "compute_on2", None) or vars(_compute_on)["compute_on"]


def compiler_options(backend: str | None = None) -> dict[str, bool | int | str]:
    """What an outermost jit that reads weights and may compute on the host is compiled with.

    `backend` is what it is compiled for; None: the default one.

    Host loops use the full width of a processor with 512-bit vectors and may reorder sums, without
    which a sum over a row of a weight is not vectorised; everything else that goes by the name of
    fast mathematics stays off. XLA:CPU of jax 0.12 takes a loop of such sums for a small one, which
    runs on a single thread, unless that pass is off; that of jax 0.10 removes barriers before it
    fuses operations, unless that one is off too (on the CPU backend; what a GPU's compiler would
    make of it is not known). On a GPU, device work would otherwise be scheduled before the host
    call, not beside it.
    """
    backend = jax.default_backend() if backend is None else backend
    if backend == "tpu":
        return {}
    host = {
        "xla_cpu_prefer_vector_width": 512,
        "xla_cpu_enable_fast_math": True,
        "xla_cpu_fast_math_honor_nans": True,
        "xla_cpu_fast_math_honor_infs": True,
        "xla_cpu_fast_math_honor_division": True,
        "xla_cpu_fast_math_honor_functions": True,
        "xla_disable_hlo_passes": "small-while-loop-hoisting",
    }
    if backend == "cpu":
        host["xla_disable_hlo_passes"] += ",cse_barrier_expander"
    if backend == "gpu":
        return host | {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            # A host call counts as one asynchronous operation, and each fetch as another: with
            # the default limit of 2, no fetch of two arrays is scheduled beside a host call.
            "xla_gpu_experimental_parallel_async_compute_limit": 4,
        }
    return host


def on_host(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns function(*arguments), computed on the host, with the results in device memory.

    Arguments may be device or pinned-host arrays. Inside the function every operand of an
    operation must be host-typed: convert device arguments first with `as_host`, and make zeros
    from an argument (`x * 0`), not from nothing.
    """
    # A fresh function object per call: with a shared one jax emits the body once, and the GPU
    # compiler of jax 0.10 and 0.11 aborts when that body contains control flow.
    fresh = functools.partial(function)
    call = _offload(fresh, compute_type="device_host", out_memory_spaces=jax.memory.Space.Device)
    return call(*arguments)


def as_host(tree: Any) -> Any:
    """Types a tree of arrays as host arrays, inside a function that runs `on_host`."""
    return jax.device_put(tree, jax.memory.Space.Host)


def as_device(tree: Any) -> Any:
    """Copies a tree of host arrays to device memory, inside a device program."""
    return jax.device_put(tree, jax.memory.Space.Device)
