"""Brings tokens into expert order, in blocks of rows that each belong to one expert, and back.

Blocks have a fixed number of rows, so every expert's share is computed by the same small program,
run as often as the counts ask for. Knows nothing about where an expert lives.
"""

from dataclasses import dataclass
from typing import no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dispatch:
    """The blocks of one layer call.

    Attributes:
      counts: tokens of each expert.
      first_block: each expert's first block; its blocks follow one another.
      block_expert: the expert of each block; past the last used block it is `experts`.
      source: the token in each row of each block; `tokens`, one past the end, in empty rows.
      position: where each token's choices went, as an index over all rows of all blocks;
        one past the end for padding tokens.
    """

    counts: Int[Array, " experts"]
    first_block: Int[Array, " experts"]
    block_expert: Int[Array, " blocks"]
    source: Int[Array, "blocks rows"]
    position: Int[Array, "tokens choices"]


def rows_per_block(tokens: int, choices: int, experts: int) -> int:
    """Rows in a block: about half of an expert's expected share, between 1 and 64."""
    share = max(1, tokens * choices // experts)
    return min(64, tokens, max(16, 1 << (share.bit_length() - 1)))


def num_blocks(tokens: int, choices: int, experts: int, rows: int) -> int:
    """The most blocks any routing can need."""
    pairs = tokens * choices
    return min(pairs, pairs // rows + min(experts, pairs))


def dispatch(
    experts: Int[Array, "tokens choices"], valid: Bool[Array, " tokens"], num_experts: int
) -> Dispatch:
    """Assigns every (valid token, choice) pair a row in a block of its expert.

    Token order is kept inside an expert, so results do not depend on how a batch was put together.
    """
    tokens, choices = experts.shape
    rows = rows_per_block(tokens, choices, num_experts)
    blocks = num_blocks(tokens, choices, num_experts, rows)
    pairs = tokens * choices
    flat = jnp.where(valid[:, None], experts, num_experts).reshape(pairs)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.bincount(flat, length=num_experts)
    used = (counts + rows - 1) // rows
    last_block = jnp.cumsum(used)
    first_block = last_block - used
    # Rank of a pair inside its expert, then its row: the expert's first row plus that rank.
    sorted_expert = flat[order]
    start = jnp.append(jnp.cumsum(counts) - counts, jnp.int32(0))[sorted_expert]
    first_row = jnp.append(first_block * rows, jnp.int32(blocks * rows))[sorted_expert]
    row = jnp.where(
        sorted_expert < num_experts,
        first_row + jnp.arange(pairs, dtype=jnp.int32) - start,
        blocks * rows,
    )
    token = (order // choices).astype(jnp.int32)
    source = jnp.full(blocks * rows, tokens, jnp.int32).at[row].set(token, mode="drop")
    position = jnp.zeros(pairs, jnp.int32).at[order].set(row)
    block_expert = (last_block[None, :] <= jnp.arange(blocks)[:, None]).sum(axis=1)
    return Dispatch(
        counts=counts,
        first_block=first_block,
        block_expert=block_expert.astype(jnp.int32),
        source=source.reshape(blocks, rows),
        position=position.reshape(tokens, choices),
    )


def gather_blocks(
    x: Float[Array, "tokens embed"], where: Dispatch
) -> Float[Array, "blocks embed rows"]:
    """Copies each block's tokens together, one token per column; empty columns are 0."""
    return x.at[where.source].get(mode="fill", fill_value=0).swapaxes(1, 2)


def combine(
    blocks: Float[Array, "blocks embed rows"],
    gates: Float[Array, "tokens choices"],
    where: Dispatch,
) -> Float[Array, "tokens embed"]:
    """Sums each token's expert outputs, weighted by its gates, in choice order; float32."""
    flat = blocks.swapaxes(1, 2).reshape(-1, blocks.shape[1])
    total = jnp.zeros((gates.shape[0], flat.shape[1]), jnp.float32)
    for choice in range(gates.shape[1]):
        rows = flat.at[where.position[:, choice]].get(mode="fill", fill_value=0)
        total += gates[:, choice, None] * rows
    return total
