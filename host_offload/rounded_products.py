"""Programs on the CPU backend whose products of bfloat16 have results in bfloat16.

Knows arrays and functions of them, not what they mean.

Such products XLA:CPU lets oneDNN compute if it is told to, as torch does. The kernels of YNNPACK,
which it uses otherwise, take up to a sixth longer and want counts of columns in multiples of 32. It
is told per program, and other products of bfloat16 become slow in it, or impossible.
"""

import functools
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from host_offload.host_compute import compiler_options
from host_offload.processor import has_matrix_units, multiplies_bfloat16

# What jax 0.10 compiles cannot be written to its persistent cache: it is compiled at every start.
warnings.filterwarnings(
    "ignore", "Error writing persistent compilation cache entry for 'jit_rounded_products'"
)

# XLA:CPU ends the process if such a program is freed as soon as its results are there: a thread may
# still be putting its workspace back (seen with jax 0.10.2). So the latest outlive their owners.
_latest: deque[Callable[..., Any]] = deque(maxlen=64)


def rounding_pays(dtype: jax.typing.DTypeLike) -> bool:
    """Whether products of many columns are faster here if their results have this dtype.

    With matrix units nobody has measured it.
    """
    here = jax.default_backend() == "cpu" and multiplies_bfloat16() and not has_matrix_units()
    return here and jnp.dtype(dtype) == jnp.bfloat16


def jit_rounded(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns jax.jit(function, **options) for a function with no other products of bfloat16."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    run.__name__ = "rounded_products"
    jitted = jax.jit(run, compiler_options=_compiler_options(), **options)
    _latest.append(jitted)
    return jitted


def _compiler_options() -> dict[str, bool | int | str]:
    options = compiler_options("cpu") | {
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_cpu_use_onednn": True,
    }
    if jax.__version_info__ >= (0, 11):
        return options | {"xla_cpu_experimental_onednn_custom_call": True}
    # XLA:CPU of jax 0.10 would convert the operands to float32 before.
    without = f"{options['xla_disable_hlo_passes']},operand_upcaster,float-normalization-bf16"
    return options | {
        "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
        "xla_disable_hlo_passes": without,
    }
