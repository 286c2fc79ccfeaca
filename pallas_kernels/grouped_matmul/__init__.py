"""The product of every row with the matrix of its group.

Knows arrays, not experts: rows come sorted, and who sorted them is not asked.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, no_type_check

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.grouped_matmul.gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tpu import grouped_matmul_tpu
from pallas_kernels.grouped_matmul.xla import grouped_matmul_xla
from pallas_kernels.interpret import TPU_INTERPRETER

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "reference": grouped_matmul_reference,
    "xla": grouped_matmul_xla,
    "gpu": grouped_matmul_gpu,
    "tpu": grouped_matmul_tpu,
    "gpu_interpret": functools.partial(grouped_matmul_gpu, interpret=True),
    "tpu_interpret": functools.partial(grouped_matmul_tpu, interpret=TPU_INTERPRETER),
}


@no_type_check  # wrong shapes get the messages of _check_arguments, in tests as in use
def grouped_matmul(
    rows: Float[Array, "rows in"],
    weights: Float[Array, "groups out in"],
    group_sizes: Int[Array, " groups"],
    *,
    gated: bool = False,
    row_weights: Float[Array, " rows"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "rows products"]:
    """Multiplies each row by its group's matrix: out[r] = weights[group of r] @ rows[r].

    The exact meaning is `reference.grouped_matmul_reference`.

    Args:
      rows: float32, bfloat16 or float16, sorted by group: the first group_sizes[0] rows belong
        to group 0, and so on.
      weights: in the dtype of rows, one [out, in] matrix per group, as checkpoints have them.
      group_sizes: rows per group, not negative; their sum is at most the number of rows.
      gated: the first half of `out` is a gate, the second what it opens: the result is
        silu(gate) * up, of half the width, computed before anything is rounded.
      row_weights: float32 factors on the rows of the result, also applied before rounding.
      implementation: a key of IMPLEMENTATIONS; None: the backend's default.

    Returns:
      The products in the dtype of rows, summed in float32. Rows past the last group give 0. NaN
      in such rows, and in the matrices of empty groups, never reaches a result.

    Raises:
      ValueError: a shape or dtype does not fit, or there is no such implementation.
    """
    multiply = choose("grouped_matmul", IMPLEMENTATIONS, implementation)
    _check_arguments(rows, weights, group_sizes, gated, row_weights)
    return multiply(rows, weights, group_sizes, row_weights, gated=gated)


def _check_arguments(
    rows: Array, weights: Array, group_sizes: Array, gated: bool, row_weights: Array | None
) -> None:
    expected = (
        (rows, "rows", "[rows in]"),
        (weights, "weights", "[groups out in]"),
        (group_sizes, "group_sizes", "[groups]"),
    )
    for array, name, axes in expected:
        if array.ndim != len(axes.split()):
            raise ValueError(f"{name} must be {axes}, got shape {array.shape}")
    if str(rows.dtype) not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"rows must be float32, bfloat16 or float16, got {rows.dtype}")
    if weights.dtype != rows.dtype:
        raise ValueError(f"weights are {weights.dtype} and rows {rows.dtype}; cast one")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")
    if weights.shape[2] != rows.shape[1]:
        raise ValueError(
            f"weights {weights.shape} take rows of {weights.shape[2]} numbers, got rows "
            f"{rows.shape}; weights must be [groups out in]"
        )
    if group_sizes.shape[0] != weights.shape[0]:
        raise ValueError(
            f"group_sizes must have groups = {weights.shape[0]} entries, got {group_sizes.shape[0]}"
        )
    if 0 in (*rows.shape, *weights.shape):
        raise ValueError(f"no axis may be empty: rows {rows.shape}, weights {weights.shape}")
    if gated and weights.shape[1] % 2:
        raise ValueError(f"gated needs an even number of outputs, got weights {weights.shape}")
    if row_weights is not None and (
        row_weights.shape != rows.shape[:1] or row_weights.dtype != jnp.float32
    ):
        raise ValueError(
            f"row_weights must be float32 of shape ({rows.shape[0]},), one per row; "
            f"got {row_weights.dtype} of shape {row_weights.shape}"
        )
