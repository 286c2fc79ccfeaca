"""Paged attention on NVIDIA GPUs, through Pallas' Triton lowering (Ampere and newer).

Knows one program's work: which queries it holds, which pages it reads. How the work is cut is
`pallas_kernels.paged_attention.gpu_tiles`.

A program holds a tile of query tokens of one sequence, for all heads that share one kv head (so
keys are read once for the whole group), and goes over its keys block by block with an online
softmax (FlashAttention-2, arXiv 2307.08691). With few programs the keys of a tile are shared out
over several (flash-decoding: Dao et al. 2023, https://pytorch.org/blog/flash-decoding/), and a
second kernel merges their results by log-sum-exp. What either leaves unwritten is never read: rows
of padding are set to 0 in the same pass.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.arguments import Pages, unpacked
from pallas_kernels.paged_attention.gpu_chunks import chunks_of, load_chunk, store_chunk
from pallas_kernels.paged_attention.gpu_tiles import (
    FEWEST_KEYS_PER_SPLIT,
    SMALLEST,
    Tiles,
    Workload,
    check_tiles,
    choose_tiles,
    item_count,
    tile_queries,
)
from pallas_kernels.tuning import bucket

__all__ = ["Tiles", "Workload", "choose_tiles", "paged_attention_gpu"]

_WIDEST_HEAD = 256
_LARGEST_GROUP = 128
_LOG2_E = math.log2(math.e)
# Start of the running maximum: below every real score, and finite, so that differences of two of
# them are 0 and not NaN.
_LOWEST = -1e30


def paged_attention_gpu(
    query: Float[Array, "tokens heads head_dim"],
    key_pages: Pages,
    value_pages: Pages,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs+1"],
    kv_lengths: Int[Array, " seqs"],
    sinks: Float[Array, " heads"] | None,
    *,
    scale: float,
    max_query_length: int,
    sliding_window: int | None,
    soft_cap: float | None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Attends in one kernel; arguments and result are those of `paged_attention_reference`.

    Args:
      tiles: sizes of the launch; None: measured ones, or a guess.
      interpret: whether to run the kernel as plain XLA operations, on any backend.

    Raises:
      ValueError: the heads are too wide or too many, or the tiles do not fit.
    """
    tokens, heads, head_dim = query.shape
    seqs, pages_per_seq = block_tables.shape
    page_size, kv_heads = key_pages.shape[1:3]
    workload = Workload(
        dtype=str(query.dtype),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        tokens=tokens,
        seqs=seqs,
        pages_per_seq=pages_per_seq,
        max_query_length=max_query_length,
        sliding_window=sliding_window,
    )
    if head_dim > _WIDEST_HEAD:
        raise ValueError(
            f"paged_attention on 'gpu' takes a head_dim of at most {_WIDEST_HEAD}, got {head_dim}; "
            f"use 'xla'"
        )
    if workload.group > _LARGEST_GROUP:
        raise ValueError(
            f"paged_attention on 'gpu' takes at most {_LARGEST_GROUP} heads per kv head, got "
            f"{workload.group} ({heads} / {kv_heads}); use 'xla'"
        )
    if tiles is None:
        tiles, _ = choose_tiles(workload)
    check_tiles(workload, tiles)

    split = tiles.splits > 1
    outputs, logs = pl.pallas_call(
        functools.partial(_attend, workload=workload, tiles=tiles, scale=scale, soft_cap=soft_cap),
        grid=(kv_heads * item_count(workload, tiles.rows), tiles.splits),
        out_shape=(
            jax.ShapeDtypeStruct(
                (tiles.splits, *query.shape), jnp.float32 if split else query.dtype
            ),
            jax.ShapeDtypeStruct((tiles.splits, tokens, heads), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="paged_attention",
    )(
        query,
        key_pages,
        value_pages,
        block_tables,
        query_starts,
        kv_lengths,
        None if sinks is None else sinks.astype(jnp.float32),
    )
    if not split:
        return outputs[0], logs[0]
    return pl.pallas_call(
        functools.partial(_merge, workload=workload),
        grid=(tokens * heads,),
        out_shape=(
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=1 if tiles.splits <= SMALLEST else 4, num_stages=1
        ),
        interpret=interpret,
        name="paged_attention_merge",
    )(outputs, logs, query_starts)


def _attend(
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    table_ref: Any,
    start_ref: Any,
    length_ref: Any,
    sink_ref: Any,
    output_ref: Any,
    log_ref: Any,
    *,
    workload: Workload,
    tiles: Tiles,
    scale: float,
    soft_cap: float | None,
) -> None:
    """One program: one query tile, one kv head, one share of the keys that the tile sees."""
    group, window = workload.group, workload.sliding_window
    page_size, block_k = workload.page_size, tiles.block_k
    tile = tile_queries(workload, tiles.rows)
    items = item_count(workload, tiles.rows)
    chunks = chunks_of(workload.head_dim)
    dtype = query_ref.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    # Neighbouring programs read neighbouring heads of the same pages. Late tiles see most keys,
    # so they start first.
    share = pl.program_id(1)
    kv_head = jax.lax.rem(pl.program_id(0), workload.kv_heads)
    item = items - 1 - jax.lax.div(pl.program_id(0), workload.kv_heads)
    seq, first = _find_tile(start_ref, item, workload, tile)
    end, length = start_ref[seq + 1], length_ref[seq]

    row = jnp.arange(tiles.rows, dtype=jnp.int32)
    row_token = jax.lax.div(row, group)
    head = kv_head * group + jax.lax.rem(row, group)
    if tiles.splits == 1:
        _clear_padding(start_ref, output_ref, log_ref, item, row_token, head, workload, tiles)

    @pl.when(first < end)
    def _() -> None:
        token = first + row_token
        real = (row_token < tile) & (token < end)

        # Keys that the tile sees lie in [low, high); row r sees those in (past[r], newest[r]].
        offset = length - end
        high = jnp.minimum(offset + jnp.minimum(first + tile, end), length)
        high = jnp.clip(high, 0, workload.pages_per_seq * page_size)
        low = 0 if window is None else jnp.maximum(offset + first - window + 1, 0)
        newest = jnp.where(real, jnp.minimum(offset + token, high - 1), -1)
        past = None if window is None else offset + token - window

        first_block = 0 if window is None else jax.lax.div(low, block_k)
        blocks = jnp.maximum(_ceil_div(high, block_k) - first_block, 0)
        blocks_per_share = _ceil_div(blocks, tiles.splits)
        if tiles.splits > 1:
            fewest = FEWEST_KEYS_PER_SPLIT // block_k
            blocks_per_share = jnp.maximum(blocks_per_share, fewest)
        begin = share * blocks_per_share
        stop = jnp.minimum(begin + blocks_per_share, blocks)

        queries = tuple(load_chunk(query_ref, (token, head), chunk, real) for chunk in chunks)
        column = jnp.arange(block_k, dtype=jnp.int32)

        def find(block: Array) -> tuple[Array, Array]:
            position = (first_block + block) * block_k + column
            live = position < high
            return position, live if window is None else live & (position >= low)

        def find_pages(block: Array) -> Array:
            # Entries that hold no visible key may name no page.
            position, live = find(block)
            entry = table_ref.at[seq, jax.lax.div(position, page_size)]
            return pltriton.load(entry, mask=live, other=0)

        def step(block: Array, carry: Any) -> Any:
            page, highest, total, weighted = carry
            position, live = find(block)
            # Looked up a step ahead: keys that wait for their page ids are not fetched early.
            next_page = find_pages(block + 1)
            place = (page, jax.lax.rem(position, page_size), kv_head)
            scores = sum(
                pltriton.dot(
                    part,
                    unpacked(load_chunk(key_ref, place, chunk, live), dtype),
                    trans_b=True,
                    precision=precision,
                )
                for part, chunk in zip(queries, chunks, strict=True)
            )
            # Scores are in units of log 2 from here on: exp2 is one instruction.
            if soft_cap is None:
                scores *= scale * _LOG2_E
            else:
                scores = jnp.tanh(scores * (scale / soft_cap)) * (soft_cap * _LOG2_E)
            seen = position[None, :] <= newest[:, None]
            if past is not None:
                seen &= position[None, :] > past[:, None]
            scores = jnp.where(seen, scores, -jnp.inf)

            new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new_highest[:, None])
            rescale = jnp.exp2(highest - new_highest)
            total = total * rescale + jnp.sum(weights, axis=1)
            weights = weights.astype(dtype)
            weighted = tuple(
                part * rescale[:, None]
                + pltriton.dot(
                    weights,
                    unpacked(load_chunk(value_ref, place, chunk, live), dtype),
                    precision=precision,
                )
                for part, chunk in zip(weighted, chunks, strict=True)
            )
            return next_page, new_highest, total, weighted

        highest = jnp.full((tiles.rows,), _LOWEST, jnp.float32)
        total = jnp.zeros((tiles.rows,), jnp.float32)
        if sink_ref is not None:
            # A sink is a score whose value is 0. One share of the keys brings it in.
            sink = pltriton.load(sink_ref.at[head], mask=real, other=0) * _LOG2_E
            highest = jnp.where(share == 0, sink, highest)
            total = jnp.where(share == 0, 1.0, total)
        weighted = tuple(jnp.zeros((tiles.rows, chunk.width), jnp.float32) for chunk in chunks)
        carry = (find_pages(begin), highest, total, weighted)
        _, highest, total, weighted = jax.lax.fori_loop(begin, stop, step, carry)

        sees = newest >= 0
        if past is not None:
            sees &= newest > past
        total = jnp.where(sees, total, 0)
        log = jnp.where(total > 0, (highest + jnp.log2(total)) / _LOG2_E, -jnp.inf)
        pltriton.store(log_ref.at[share, token, head], log, mask=real)
        inverse = 1 / jnp.where(total > 0, total, 1)
        # A share with nothing to say leaves its partial result unwritten; the merge skips it.
        stored = real if tiles.splits == 1 else real & (total > 0)
        for part, chunk in zip(weighted, chunks, strict=True):
            store_chunk(output_ref, (share, token, head), chunk, part * inverse[:, None], stored)


def _find_tile(start_ref: Any, item: Array, workload: Workload, tile: int) -> tuple[Array, Array]:
    """Returns the sequence of an item and its first token; past the sequence's end if it is empty.

    Items are dealt out so that the first item of sequence s is query_starts[s] // tile + s: all
    its tiles fit before that of s + 1, and no prefix sum is needed.
    """
    if workload.max_query_length <= tile:
        return item, start_ref[item]
    lane = jnp.arange(bucket(workload.seqs), dtype=jnp.int32)
    inside = lane < workload.seqs
    starts = pltriton.load(start_ref.at[lane], mask=inside, other=0)
    begun = inside & (jax.lax.div(starts, tile) + lane <= item)
    seq = jnp.sum(begun.astype(jnp.int32)) - 1
    start = start_ref[seq]
    return seq, start + (item - seq - jax.lax.div(start, tile)) * tile


def _clear_padding(
    start_ref: Any,
    output_ref: Any,
    log_ref: Any,
    item: Array,
    row_token: Array,
    head: Array,
    workload: Workload,
    tiles: Tiles,
) -> None:
    """Writes 0 and minus infinity into this program's part of the rows after the last sequence."""
    tile, items = tile_queries(workload, tiles.rows), item_count(workload, tiles.rows)
    first = start_ref[workload.seqs]
    count = _ceil_div(jnp.maximum(workload.tokens - first, 0), tile)
    mine = _ceil_div(jnp.maximum(count - item, 0), items)

    def clear(index: Array, _: None) -> None:
        token = first + (item + index * items) * tile + row_token
        mask = (row_token < tile) & (token < workload.tokens)
        share = jnp.int32(0)
        nothing = jnp.full((tiles.rows,), -jnp.inf, jnp.float32)
        pltriton.store(log_ref.at[share, token, head], nothing, mask=mask)
        for chunk in chunks_of(workload.head_dim):
            zeros = jnp.zeros((tiles.rows, chunk.width), jnp.float32)
            store_chunk(output_ref, (share, token, head), chunk, zeros, mask)

    jax.lax.fori_loop(0, mine, clear, None)


def _merge(
    part_ref: Any,
    part_log_ref: Any,
    start_ref: Any,
    output_ref: Any,
    log_ref: Any,
    *,
    workload: Workload,
) -> None:
    """One program: one head of one token, attended over disjoint sets of keys."""
    token = jax.lax.div(pl.program_id(0), workload.heads)
    head = jax.lax.rem(pl.program_id(0), workload.heads)
    share = jnp.arange(part_ref.shape[0], dtype=jnp.int32)
    real = jnp.broadcast_to(token < start_ref[workload.seqs], share.shape)
    logs = pltriton.load(part_log_ref.at[share, token, head], mask=real, other=-jnp.inf)
    highest = jnp.maximum(jnp.max(logs), _LOWEST)
    weights = jnp.exp(logs - highest)
    total = jnp.sum(weights)
    log_ref[token, head] = jnp.where(total > 0, highest + jnp.log(total), -jnp.inf)
    weights /= jnp.where(total > 0, total, 1)
    for chunk in chunks_of(workload.head_dim):
        parts = load_chunk(part_ref, (share, token, head), chunk, logs > -jnp.inf)
        merged = jnp.sum(parts * weights[:, None], axis=0)
        column = jnp.arange(chunk.width, dtype=jnp.int32)
        pltriton.store(
            output_ref.at[token, head, chunk.start + column],
            merged.astype(output_ref.dtype),
            mask=column < chunk.real,
        )


def _ceil_div(number: Array, by: int) -> Array:
    """Divides an array that is nowhere negative, rounding up."""
    return jax.lax.div(number + (by - 1), by)
