"""Paged attention for TPUs: one Pallas kernel, lowered through Mosaic.

Knows how the TPU tiles memory; nothing of other backends.

Programs run in order over (sequence, tile of queries). Each reads the pages that its queries see,
block by block and double buffered, with an online softmax (Milakov and Gimelshein, arXiv
1805.02867; blockwise as in FlashAttention, arXiv 2205.14135).

A page is only copied well if its last axis fills the 128 lanes. XLA lays an array out for least
padding, so where head_dim is no multiple of 128 it would turn the whole cache over before every
call. Kv heads are therefore taken together (`lane_packing`) until they fill the lanes, and the
queries of each are set among zeros. Keep such a cache as `[pages, page_size, kv_heads / packing,
packing * head_dim]` and reshape it for the call: the two reshapes cancel, and nothing is copied.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.arguments import Pages, unpacked
from pallas_kernels.paged_attention.tpu_tiles import LANES, Tiles, choose_tiles, lane_packing

# Start of the running maximum: below every real score, and finite, so that differences of two of
# them are 0 and not NaN.
_LOWEST = -1e30
# Up to this many rows (queries times heads) are multiplied with the keys of all kv heads, and the
# scores of other heads masked: taking the heads' keys apart would cost more than those products.
_MERGED_ROWS = 128


class _Layout(NamedTuple):
    """Static facts of one call, as the kernel sees them."""

    scale: float
    sliding_window: int | None
    soft_cap: float | None
    packs: int  # groups of kv heads that fill the lanes
    packing: int  # kv heads in each
    group: int  # heads per kv head
    merged: bool  # one product for all packs at once
    head_dim: int
    page_size: int
    pages: int
    pages_per_seq: int
    tiles: Tiles

    @property
    def products(self) -> int:
        """Products that make the scores of one block."""
        return 1 if self.merged else self.packs

    @property
    def heads_per_product(self) -> int:
        return self.packs * self.packing * self.group // self.products

    @property
    def rows(self) -> int:
        """Rows of a product: (query, head)."""
        return self.tiles.block_q * self.heads_per_product

    @property
    def columns_per_key(self) -> int:
        return self.packs // self.products

    @property
    def width(self) -> int:
        return self.packing * self.head_dim

    @property
    def block_keys(self) -> int:
        return self.tiles.pages_per_block * self.page_size


def paged_attention_tpu(
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
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Attends blockwise; arguments and result are those of `paged_attention_reference`.

    Args:
      tiles: sizes of the blocks; None: what was measured for this device, or else a guess.
      interpret: whether to emulate the kernel, and how; for tests.

    Raises:
      ValueError: float16, which Mosaic does not compile for TPUs; a number of kv heads that does
        not fill the lanes.
    """
    tokens, heads, head_dim = query.shape
    pages, page_size, kv_heads, _ = key_pages.shape
    seqs, pages_per_seq = block_tables.shape
    if query.dtype == jnp.float16:
        raise ValueError(
            "paged_attention 'tpu' computes in float32 or bfloat16, got float16; convert to "
            "bfloat16, or use the implementation 'xla'"
        )
    packing = lane_packing(kv_heads, head_dim)
    if tiles is None:
        tiles, _ = choose_tiles(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=page_size,
            pages_per_seq=pages_per_seq,
            max_query_length=max_query_length,
            dtype=query.dtype,
        )
    layout = _Layout(
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        packs=kv_heads // packing,
        packing=packing,
        group=heads // kv_heads,
        merged=tiles.block_q * heads <= _MERGED_ROWS,
        head_dim=head_dim,
        page_size=page_size,
        pages=pages,
        pages_per_seq=pages_per_seq,
        tiles=tiles,
    )
    block_q = tiles.block_q
    # The last tile may reach past the last token.
    rows = tokens + block_q - 1
    lanes = -(-heads // LANES) * LANES
    sink_row = jnp.zeros((1, lanes))
    if sinks is not None:
        sink_row = sink_row.at[0, :heads].set(sinks.astype(jnp.float32))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    page = _page_shape(layout, query.dtype)
    blocks = (2, tiles.pages_per_block * page[0], *page[1:])
    columns = layout.block_keys * layout.packs
    staged = _is_staged(layout, query.dtype)
    state = (layout.products, layout.rows)
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(seqs, -(-max_query_length // block_q)),
        in_specs=[hbm, hbm, hbm, pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=[hbm, hbm],
        scratch_shapes=[
            pltpu.VMEM((block_q, heads, head_dim), query.dtype),
            pltpu.VMEM((block_q, 1, lanes), jnp.float32),
            pltpu.VMEM(blocks, key_pages.dtype),
            pltpu.VMEM(blocks, value_pages.dtype),
            pltpu.VMEM(
                (2, *((layout.width // LANES, columns) if staged else (1, 8)), LANES), jnp.float32
            ),
            pltpu.VMEM((*state, layout.width), query.dtype),
            pltpu.VMEM((*state, layout.width), jnp.float32),
            pltpu.VMEM((*state, LANES), jnp.float32),
            pltpu.VMEM((*state, LANES), jnp.float32),
            pltpu.SemaphoreType.DMA((2, 2)),
            pltpu.SemaphoreType.DMA((2,)),
        ],
    )
    output, log_sum_exp = pl.pallas_call(
        functools.partial(_kernel, layout=layout, has_sinks=sinks is not None),
        grid_spec=grid_spec,
        out_shape=[
            jax.ShapeDtypeStruct((rows, heads, head_dim), query.dtype),
            jax.ShapeDtypeStruct((rows, 1, lanes), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )(
        block_tables,
        query_starts,
        kv_lengths,
        jnp.pad(query, ((0, block_q - 1), (0, 0), (0, 0))),
        key_pages.reshape(pages, *page),
        value_pages.reshape(pages, *page),
        sink_row,
    )
    # Rows of no sequence were never written, or hold what a tile left past its sequence's end.
    real = jnp.arange(tokens, dtype=jnp.int32) < query_starts[-1]
    return (
        jnp.where(real[:, None, None], output[:tokens], 0),
        jnp.where(real[:, None], log_sum_exp[:tokens, 0, :heads], -jnp.inf),
    )


def _page_shape(layout: _Layout, dtype: jnp.dtype) -> tuple[int, ...]:
    """Returns the shape of one page as the kernel reads it: a view of what XLA keeps."""
    packs, width = layout.packs, layout.width
    # Rows of one lane tile lie one after another unless they are padded; wider ones only in
    # whole tiles of 8 rows. XLA drops a lone head from the tiles of 16 bit arrays.
    whole = packs % 8 == 0 or (packs == 1 and jnp.dtype(dtype).itemsize == 2)
    if whole or (width == LANES and packs in (1, 2, 4)):
        return (layout.page_size * packs, width)
    return (layout.page_size, packs, width)


def _is_staged(layout: _Layout, dtype: jnp.dtype) -> bool:
    """Returns whether the keys of the kv heads are taken apart by way of a float32 copy."""
    apart = not layout.merged and layout.packs > 1 and layout.width % LANES == 0
    return apart and not _is_strided(layout, dtype)


def _is_strided(layout: _Layout, dtype: jnp.dtype) -> bool:
    """Returns whether every n-th row of a block can be loaded as it lies."""
    flat = len(_page_shape(layout, dtype)) == 2
    return flat and jnp.dtype(dtype).itemsize == 4 and layout.width == LANES


def _kernel(
    # scalars
    tables,
    query_starts,
    kv_lengths,
    # inputs
    query,
    key_pages,
    value_pages,
    sinks,
    # outputs
    output,
    log_sum_exp,
    # scratch
    tile,
    tile_log,
    key_blocks,
    value_blocks,
    stage,
    wide,
    weighted,
    highest,
    total,
    page_done,
    tile_done,
    *,
    layout: _Layout,
    has_sinks: bool,
):
    """Attends from one tile of one sequence's queries."""
    seq, block_q = pl.program_id(0), layout.tiles.block_q
    start = query_starts[seq] + pl.program_id(1) * block_q
    end = query_starts[seq + 1]

    @pl.when(start < end)
    def _work():
        # Position of row r's query is first_position + r; keys in [low, high) are seen by some.
        first_position = kv_lengths[seq] - end + start
        last_position = kv_lengths[seq] - end + jnp.minimum(start + block_q, end) - 1
        high = jnp.clip(last_position + 1, 0, layout.pages_per_seq * layout.page_size)
        low = jnp.int32(0)
        if layout.sliding_window is not None:
            low = jnp.maximum(first_position - layout.sliding_window + 1, 0)
        first_block = low // layout.block_keys
        end_block = pl.cdiv(high, layout.block_keys)

        def each_page(block: Array, slot: Array, act: Callable) -> None:
            """Acts on the copy of every page of the block that holds a visible key."""
            first = block * layout.tiles.pages_per_block
            begin = jnp.maximum(first, low // layout.page_size)
            stop = jnp.minimum(
                first + layout.tiles.pages_per_block, pl.cdiv(high, layout.page_size)
            )

            def one(index: Array, carry: None) -> None:
                page = jnp.clip(tables[seq, index], 0, layout.pages - 1)
                for kind, (source, blocks) in enumerate(
                    ((key_pages, key_blocks), (value_pages, value_blocks))
                ):
                    size = source.shape[1]
                    rows = pl.ds(pl.multiple_of((index - first) * size, size), size)
                    target = blocks.at[slot, rows]
                    act(pltpu.make_async_copy(source.at[page], target, page_done.at[kind, slot]))

            jax.lax.fori_loop(begin, stop, one, None)

        @pl.when(first_block < end_block)
        def _fetch_first():
            each_page(first_block, jnp.int32(0), lambda copy: copy.start())

        copy = pltpu.make_async_copy(query.at[pl.ds(start, block_q)], tile, tile_done.at[0])
        copy.start()
        copy.wait()
        _begin(tile, wide, weighted, highest, total, sinks, layout=layout, has_sinks=has_sinks)

        def step(block: Array, carry: None) -> None:
            slot = (block - first_block) % 2

            @pl.when(block + 1 < end_block)
            def _fetch_next():
                each_page(block + 1, 1 - slot, lambda copy: copy.start())

            each_page(block, slot, lambda copy: copy.wait())
            _attend(
                key_blocks.at[slot],
                value_blocks.at[slot],
                stage,
                wide,
                weighted,
                highest,
                total,
                first_key=block * layout.block_keys,
                low=low,
                high=high,
                first_position=first_position,
                layout=layout,
            )

        jax.lax.fori_loop(first_block, end_block, step, None)
        _finish(
            tile,
            tile_log,
            weighted,
            highest,
            total,
            high=high,
            first_position=first_position,
            layout=layout,
        )
        # What lies past the sequence's end is overwritten: programs run in the order of rows.
        rows = pl.ds(start, block_q)
        copies = (
            pltpu.make_async_copy(tile, output.at[rows], tile_done.at[0]),
            pltpu.make_async_copy(tile_log, log_sum_exp.at[rows], tile_done.at[1]),
        )
        for copy in copies:
            copy.start()
        for copy in copies:
            copy.wait()


def _head_of_row(layout: _Layout, width: int) -> Int[Array, "rows _"]:
    row = jax.lax.broadcasted_iota(jnp.int32, (layout.rows, width), 0)
    return jax.lax.rem(row, layout.heads_per_product)


def _chosen_lane(layout: _Layout, product: int, lanes: int) -> Array:
    """Returns, per row, a mask that is true in the lane of the row's head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (layout.rows, lanes), 1)
    return lane == _head_of_row(layout, lanes) + product * layout.heads_per_product


def _begin(tile, wide, weighted, highest, total, sinks, *, layout: _Layout, has_sinks: bool):
    """Lays the queries out by pack, and starts the online softmax."""
    queries = tile[...].astype(jnp.float32)
    sub = _head_of_row(layout, layout.head_dim) // layout.group % layout.packing
    for product in range(layout.products):
        mine = slice(product * layout.heads_per_product, (product + 1) * layout.heads_per_product)
        rows = queries[:, mine].reshape(layout.rows, layout.head_dim)
        if layout.packing > 1:
            parts = [jnp.where(sub == i, rows, 0) for i in range(layout.packing)]
            rows = jnp.concatenate(parts, axis=1)
        wide[product] = rows.astype(wide.dtype)
        if has_sinks:
            # A sink is a score whose value is 0: it starts the maximum and the sum.
            lanes = sinks.shape[1]
            spread = jnp.broadcast_to(sinks[...], (layout.rows, lanes))
            sink = jnp.where(_chosen_lane(layout, product, lanes), spread, 0)
            sink = jnp.sum(sink, axis=1, keepdims=True)
            highest[product] = jnp.broadcast_to(sink, (layout.rows, LANES))
    if not has_sinks:
        highest[...] = jnp.full(highest.shape, _LOWEST)
    total[...] = jnp.full(total.shape, float(has_sinks))
    weighted[...] = jnp.zeros(weighted.shape)


def _attend(
    keys,
    values,
    stage,
    wide,
    weighted,
    highest,
    total,
    *,
    first_key,
    low,
    high,
    first_position,
    layout: _Layout,
):
    """Adds one block of keys to the online softmax of every pack."""
    precision = jax.lax.Precision.HIGHEST if wide.dtype == jnp.float32 else None

    def dot(left: Array, right: Array, contract: int) -> Array:
        return jax.lax.dot_general(
            left,
            right,
            (((1,), (contract,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    @pl.when((first_key < low) | (first_key + layout.block_keys > high))
    def _hide():
        # What nobody sees may be NaN, and 0 times NaN is NaN.
        block = unpacked(values[...], wide.dtype).astype(jnp.float32)
        row = jax.lax.broadcasted_iota(jnp.int32, block.shape, 0)
        key = jax.lax.div(row, values.shape[0] // layout.block_keys) + first_key
        block = jnp.where((key >= low) & (key < high), block, 0).astype(wide.dtype)
        values[...] = unpacked(block, values.dtype)

    columns = layout.block_keys * layout.columns_per_key
    shape = (layout.rows, columns)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    position = jax.lax.div(row, layout.heads_per_product) + first_position
    key = jax.lax.div(column, layout.columns_per_key) + first_key
    seen = key <= position
    if layout.sliding_window is not None:
        seen &= key > position - layout.sliding_window
    if layout.columns_per_key > 1:
        pack = jax.lax.div(_head_of_row(layout, columns), layout.packing * layout.group)
        seen &= jax.lax.rem(column, layout.columns_per_key) == pack

    key_of = _taken_apart(keys, stage.at[0], wide.dtype, layout)
    value_of = _taken_apart(values, stage.at[1], wide.dtype, layout)
    for product in range(layout.products):
        scores = dot(wide[product], key_of(product), 1) * layout.scale
        if layout.soft_cap is not None:
            scores = layout.soft_cap * jnp.tanh(scores / layout.soft_cap)
        scores = jnp.where(seen, scores, -jnp.inf)
        before = highest[product]
        after = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - after[:, :1])
        rescale = jnp.exp(before - after)
        highest[product] = after
        total[product] = total[product] * rescale + jnp.sum(weights, axis=1, keepdims=True)
        new = dot(weights.astype(wide.dtype), value_of(product), 0)
        weighted[product] = weighted[product] * rescale[:, :1] + new


def _taken_apart(block, stage, dtype: jnp.dtype, layout: _Layout) -> Callable[[int], Array]:
    """Returns what gives the [columns width] keys, or values, of each product."""

    def flat() -> Array:
        return unpacked(block[...].reshape(-1, layout.width), dtype)

    if layout.merged or layout.packs == 1:
        whole = flat()
        return lambda product: whole

    def rows(product: int) -> pl.Slice:
        return pl.ds(product, layout.block_keys, stride=layout.packs)

    # Mosaic loads every n-th row only of arrays of 32 bits and one tile of lanes.
    if _is_strided(layout, dtype):
        return lambda product: unpacked(block[rows(product)], dtype)
    if _is_staged(layout, dtype):
        whole, chunks = flat().astype(jnp.float32), layout.width // LANES
        for i in range(chunks):
            stage[i] = whole[:, i * LANES : (i + 1) * LANES]
        return lambda product: jnp.concatenate(
            [stage[i, rows(product)] for i in range(chunks)], axis=1
        ).astype(dtype)
    apart = flat().reshape(layout.block_keys, layout.packs, layout.width)
    return lambda product: apart[:, product]


def _finish(tile, tile_log, weighted, highest, total, *, high, first_position, layout: _Layout):
    """Divides by the sums, and lays the results out by query."""
    block_q, lanes = layout.tiles.block_q, tile_log.shape[2]
    row = jax.lax.broadcasted_iota(jnp.int32, (layout.rows, LANES), 0)
    position = row // layout.heads_per_product + first_position
    # Rows past the sequence's end may be NaN, which must not reach the sums below.
    sees = (position >= 0) & (position < high)
    sub = _head_of_row(layout, layout.head_dim) // layout.group % layout.packing
    query = jax.lax.broadcasted_iota(jnp.int32, (block_q, layout.rows), 0)
    of_query = jax.lax.broadcasted_iota(jnp.int32, (block_q, layout.rows), 1)
    of_query = (of_query // layout.heads_per_product == query).astype(jnp.float32)
    by_query = jnp.zeros((block_q, lanes))
    for product in range(layout.products):
        inverse = jnp.where(sees, 1 / total[product], 0)[:, :1]
        rows = weighted[product] * inverse
        if layout.packing > 1:
            parts = (
                jnp.where(sub == i, rows[:, i * layout.head_dim : (i + 1) * layout.head_dim], 0)
                for i in range(layout.packing)
            )
            rows = functools.reduce(jnp.add, parts)
        rows = rows.reshape(block_q, layout.heads_per_product, layout.head_dim)
        mine = slice(product * layout.heads_per_product, (product + 1) * layout.heads_per_product)
        tile[:, mine] = rows.astype(tile.dtype)
        log = jnp.where(sees, highest[product] + jnp.log(total[product]), _LOWEST)[:, :1]
        spread = jnp.where(_chosen_lane(layout, product, lanes), log, 0)
        # A product with ones and zeros moves heads from rows to lanes.
        by_query += jnp.dot(of_query, spread, precision=jax.lax.Precision.HIGHEST)
    by_query = jnp.where(by_query < 0.5 * _LOWEST, -math.inf, by_query)
    tile_log[...] = by_query.reshape(tile_log.shape)
