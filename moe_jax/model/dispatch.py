"""Brings tokens into expert order, in blocks of rows that each belong to one expert, and back.

A block has one of a few static widths, so every expert's share is computed by the same few small
programs, run as often as the counts ask for: as many blocks of the largest width as it fills, and
one of the smallest width that holds the rest. Knows nothing about where an expert lives.
"""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bits import as_bits, from_bits

# Up to so many a sort and its scatters take longer than comparing each with each.
_FEW_PAIRS = 32


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dispatch:
    """The blocks of one layer call.

    Attributes:
      counts: tokens of each expert.
      used: rows of each expert's blocks, which follow one another.
      first_block: each expert's first block; its blocks follow one another.
      block_expert: the expert of each block; past the last used block it is `experts`.
      block_start: the first row of each block.
      block_width: the width of each block, as an index into `widths`.
      source: the token in each row; `tokens`, one past the end, in empty rows.
      position: the row of each token's choices; one past the end for padding tokens.
      widths: how many rows a block may have, rising.
    """

    counts: Int[Array, " experts"]
    used: Int[Array, " experts"]
    first_block: Int[Array, " experts"]
    block_expert: Int[Array, " blocks"]
    block_start: Int[Array, " blocks"]
    block_width: Int[Array, " blocks"]
    source: Int[Array, " rows"]
    position: Int[Array, "tokens choices"]
    widths: tuple[int, ...] = field(metadata={"static": True})


def block_widths(tokens: int, choices: int, experts: int, rounded: bool = False) -> tuple[int, ...]:
    """The widths of blocks in a step of this many tokens; rising.

    On XLA:CPU up to six tokens are multiplied in the time that reading the weight takes, or little
    more; seven to fifteen take no less than sixteen, and from a few hundred on
    a token costs no less in a wider block. Each width of each expert is compiled, so short steps
    and layers of many experts make do with few. Products that are `rounded` take as long as their
    tokens want where the others take as long as the next multiple of 32, so that blocks of more
    widths pay.
    """
    if tokens <= 8:
        return (min(tokens, 4),)
    if tokens <= 16:
        few = (4, 6) if experts <= 16 else (4,)
        return few if tokens * choices <= 4 * experts else (*few, 16)
    if tokens <= 32:
        return (16,)
    share = 1 << max(16, tokens * choices // experts).bit_length() - 1
    if experts <= 16:
        count = 4 if tokens <= 128 else 16 if rounded else 8
        step = max(16, 2 * share // count)
        widths = range(step, count * step + 1, step)
    else:
        widths = (max(16, share // 2), share, 2 * share)
    fitting = {min(width, tokens, 256) for width in widths}
    return tuple(sorted(fitting))


def num_blocks(tokens: int, choices: int, experts: int, widths: tuple[int, ...]) -> int:
    """The most blocks any routing can need."""
    pairs = tokens * choices
    return min(pairs, pairs // widths[-1] + min(experts, pairs))


def num_rows(tokens: int, choices: int, experts: int, widths: tuple[int, ...]) -> int:
    """The most rows that the blocks of any routing can have."""
    pairs = tokens * choices
    unused = int(np.diff([0, *widths]).max()) - 1
    return pairs + min(experts, pairs) * unused


def dispatch(
    experts: Int[Array, "tokens choices"],
    valid: Bool[Array, " tokens"],
    num_experts: int,
    widths: tuple[int, ...],
) -> Dispatch:
    """Assigns every (valid token, choice) pair a row in a block of its expert.

    Token order is kept inside an expert, so results do not depend on how a batch was put together.
    """
    tokens, choices = experts.shape
    blocks = num_blocks(tokens, choices, num_experts, widths)
    rows = num_rows(tokens, choices, num_experts, widths)
    pairs, largest = tokens * choices, widths[-1]
    flat = jnp.where(valid[:, None], experts, num_experts).reshape(pairs)
    rank, counts = (_rank_few if pairs <= _FEW_PAIRS else _rank)(flat, num_experts)
    full, rest = counts // largest, counts % largest
    width_of = jnp.asarray(widths, jnp.int32)
    last_width = (rest[:, None] > width_of[None, :]).sum(axis=1, dtype=jnp.int32)
    used_blocks = full + (rest > 0).astype(jnp.int32)
    used = full * largest + jnp.where(rest > 0, width_of[last_width], 0)
    last_block = jnp.cumsum(used_blocks)
    first_block, first_row = last_block - used_blocks, jnp.cumsum(used) - used
    row = jnp.append(first_row, jnp.int32(rows))[flat] + rank
    row = jnp.where(flat < num_experts, row, rows)
    token = jnp.arange(pairs, dtype=jnp.int32) // choices
    block = jnp.arange(blocks, dtype=jnp.int32)
    block_expert = (last_block[None, :] <= block[:, None]).sum(axis=1).astype(jnp.int32)
    owner = jnp.minimum(block_expert, num_experts - 1)
    order = block - first_block[owner]
    return Dispatch(
        counts=counts,
        used=used,
        first_block=first_block,
        block_expert=block_expert,
        block_start=first_row[owner] + order * largest,
        block_width=jnp.where(order < full[owner], len(widths) - 1, last_width[owner]),
        source=jnp.full(rows, tokens, jnp.int32).at[row].set(token, mode="drop"),
        position=row.reshape(tokens, choices),
        widths=widths,
    )


def _rank(
    flat: Int[Array, " pairs"], num_experts: int
) -> tuple[Int[Array, " pairs"], Int[Array, " experts"]]:
    """Each pair's place among those of its expert, and how many these are."""
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=num_experts)
    start = jnp.append(jnp.cumsum(counts) - counts, jnp.int32(0))[flat]
    place = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    return place - start, counts


def _rank_few(
    flat: Int[Array, " pairs"], num_experts: int
) -> tuple[Int[Array, " pairs"], Int[Array, " experts"]]:
    """`_rank` without sorting: of few pairs, each can look at all others."""
    before = jnp.tri(flat.size, k=-1, dtype=bool)
    rank = ((flat[:, None] == flat[None, :]) & before).sum(axis=1, dtype=jnp.int32)
    counts = (jnp.arange(num_experts)[:, None] == flat[None, :]).sum(axis=1, dtype=jnp.int32)
    return rank, counts


def gather_rows(x: Float[Array, "tokens embed"], where: Dispatch) -> Float[Array, "rows embed"]:
    """Copies tokens into expert order; empty rows are 0."""
    return from_bits(as_bits(x).at[where.source].get(mode="fill", fill_value=0), x.dtype)


def combine(
    rows: Float[Array, "rows embed"],
    gates: Float[Array, "tokens choices"],
    where: Dispatch,
) -> Float[Array, "tokens embed"]:
    """Sums each token's expert outputs, weighted by its gates, in choice order; float32."""
    total = jnp.zeros((gates.shape[0], rows.shape[1]), jnp.float32)
    for choice in range(gates.shape[1]):
        chosen = rows.at[where.position[:, choice]].get(mode="fill", fill_value=0)
        total += gates[:, choice, None] * chosen.astype(jnp.float32)
    return total
