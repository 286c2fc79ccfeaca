"""One program of paged attention on a TPU: a tile of one sequence's queries over its pages.

Knows refs and copies between memories; how the call was cut up is told by its `Layout`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.arguments import unpacked
from pallas_kernels.paged_attention.tpu_layout import Layout, is_staged, is_strided
from pallas_kernels.paged_attention.tpu_tiles import LANES

# Start of the running maximum: below every real score, and finite, so that differences of two of
# them are 0 and not NaN.
_LOWEST = -1e30


def attend_tile(
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
    layout: Layout,
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


def _head_of_row(layout: Layout, width: int) -> Int[Array, "rows _"]:
    row = jax.lax.broadcasted_iota(jnp.int32, (layout.rows, width), 0)
    return jax.lax.rem(row, layout.heads_per_product)


def _chosen_lane(layout: Layout, product: int, lanes: int) -> Array:
    """Returns, per row, a mask that is true in the lane of the row's head."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (layout.rows, lanes), 1)
    return lane == _head_of_row(layout, lanes) + product * layout.heads_per_product


def _begin(tile, wide, weighted, highest, total, sinks, *, layout: Layout, has_sinks: bool):
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
    layout: Layout,
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


def _taken_apart(block, stage, dtype: jnp.dtype, layout: Layout) -> Callable[[int], Array]:
    """Returns what gives the [columns width] keys, or values, of each product."""

    def flat() -> Array:
        return unpacked(block[...].reshape(-1, layout.width), dtype)

    if layout.merged or layout.packs == 1:
        whole = flat()
        return lambda product: whole

    def rows(product: int) -> pl.Slice | slice:
        return pl.ds(product, layout.block_keys, stride=layout.packs)

    # Mosaic loads every n-th row only of arrays of 32 bits and one tile of lanes.
    if is_strided(layout, dtype):
        return lambda product: unpacked(block[rows(product)], dtype)
    if is_staged(layout, dtype):
        whole, chunks = flat().astype(jnp.float32), layout.width // LANES
        for i in range(chunks):
            stage[i] = whole[:, i * LANES : (i + 1) * LANES]
        return lambda product: jnp.concatenate(
            [stage[i, rows(product)] for i in range(chunks)], axis=1
        ).astype(dtype)
    apart = flat().reshape(layout.block_keys, layout.packs, layout.width)
    return lambda product: apart[:, product]


def _finish(tile, tile_log, weighted, highest, total, *, high, first_position, layout: Layout):
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
