"""The loop that runs blocks of rows, each by its expert. Knows nothing about where they lie."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.model.dispatch import Dispatch
from pallas_kernels.bits import as_bits, from_bits

# (expert, rows [width, embed]) -> [width, embed] in float32.
Ffn = Callable[[Any, Array], Array]


class Order(NamedTuple):
    """Blocks to be run, those of one width after those of another.

    Attributes:
      blocks: the blocks; past the last end, others.
      ends: behind the last block of each width, in `blocks`.
    """

    blocks: Int[Array, " blocks"]
    ends: Int[Array, " widths"]


def order_by_width(where: Dispatch, chosen: Bool[Array, " blocks"]) -> Order:
    """Sorts the chosen blocks by their widths. Not for the inside of a host computation."""
    width = jnp.where(chosen, where.block_width, len(where.widths))
    ends = (width[None] <= jnp.arange(len(where.widths))[:, None]).sum(axis=1, dtype=jnp.int32)
    return Order(jnp.argsort(width, stable=True).astype(jnp.int32), ends)


def run_blocks(
    ffn: Ffn,
    experts: Sequence[Any],
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    first_expert: int | Int[Array, ""],
    order: Order,
    output: Float[Array, "rows embed"],
) -> Float[Array, "rows embed"]:
    """Adds the results of these blocks to their rows of `output`.

    `experts` begin with expert `first_expert` of the dispatch. There is a loop per width, so that a
    block moves no more rows than it has.
    """
    bits, begin = as_bits(rows), 0
    for index, width in enumerate(where.widths):
        run = functools.partial(
            _run_block, ffn, experts, width, bits, rows.dtype, where, order, first_expert
        )
        output = lax.fori_loop(begin, order.ends[index], run, output)
        begin = order.ends[index]
    return output


def _run_block(ffn, experts, width, bits, dtype, where, order, first_expert, i, output):
    block = order.blocks[i]
    start, expert = where.block_start[block], where.block_expert[block] - first_expert
    x = from_bits(lax.dynamic_slice_in_dim(bits, start, width), dtype)
    before = lax.dynamic_slice_in_dim(output, start, width)
    # Added in the branch, or XLA:CPU might lay all of the output out as the branch's result.
    after = lax.switch(expert, [functools.partial(_add, ffn, one) for one in experts], x, before)
    return lax.dynamic_update_slice_in_dim(output, after, start, 0)


def _add(ffn, expert, x, before):
    return before + ffn(expert, x).astype(before.dtype)
