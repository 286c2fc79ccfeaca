"""The loop that runs blocks of columns, each by its expert. Knows nothing about where they lie."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from moe_jax.model.dispatch import Dispatch
from moe_jax.model.ops import FEW_COLUMNS

# (expert, columns [embed, width]) -> [embed, width] in float32.
Ffn = Callable[[Any, Array], Array]


def run_blocks(
    ffn: Ffn,
    experts: Sequence[Any],
    columns: Float[Array, "embed columns"],
    where: Dispatch,
    first_expert: int | Int[Array, ""],
    order: Int[Array, " blocks"],
    begin: int | Int[Array, ""],
    end: int | Int[Array, ""],
    output: Float[Array, "embed columns"],
) -> Float[Array, "embed columns"]:
    """Adds the results of the blocks order[begin:end] to their columns of `output`.

    `experts` begin with expert `first_expert` of the dispatch. Every block reads and writes as many
    columns as the widest; what is not its own is not computed, and 0 is added to it.
    """
    widths = where.widths
    few = max((width for width in widths if width <= FEW_COLUMNS), default=0)
    branches = [
        functools.partial(_run_width, ffn, expert, width) for expert in experts for width in widths
    ]

    def run(i, output):
        block = order[i]
        start = where.block_start[block]
        branch = (where.block_expert[block] - first_expert) * len(widths) + where.block_width[block]
        x = lax.dynamic_slice_in_dim(columns, start, widths[-1], 1)
        # What enters a branch is laid out as it is indexed: a few columns in one piece each.
        y = lax.switch(branch, branches, x, x[:, :few].T)
        y = y + lax.dynamic_slice_in_dim(output, start, widths[-1], 1)
        return lax.dynamic_update_slice_in_dim(output, y, start, 1)

    return lax.fori_loop(begin, end, run, output)


def _run_width(ffn: Ffn, expert: Any, width: int, columns: Array, few_rows: Array) -> Array:
    few = width <= few_rows.shape[0]
    y = ffn(expert, few_rows[:width].T if few else columns[:, :width])
    return jnp.pad(y, ((0, 0), (0, columns.shape[1] - width)))
