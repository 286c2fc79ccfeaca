"""Paged attention from XLA operations: the cost follows the true lengths, the shapes never do.

Knows no backend: the forms were chosen where XLA is weakest, on the CPU, and are sound elsewhere.

Keys are read block by block with an online softmax (Milakov and Gimelshein, arXiv 1805.02867; the
blockwise form is FlashAttention's, arXiv 2205.14135) in loops whose trip counts are traced. Two
ways to lay out the queries share that loop:

    few queries per sequence (decode)     every sequence at once, [seqs, kv_heads, rows, head_dim]
    many (prefill)                        one work item per block of queries of one sequence

In both, matrices are head-major and contiguous, and batched over kv_heads: a product over
token-major arrays is several times slower on XLA:CPU.
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.bits import as_bits, from_bits
from pallas_kernels.paged_attention.arguments import Pages, unpacked

# Up to this many queries per sequence all sequences are computed at once, padded to the longest.
_FEW_QUERIES = 8
# Key positions per block. Small blocks cost loop overhead, large ones work past the end of the
# context (decode) and above the diagonal (prefill); and the blocks of all sequences that decode
# together must stay in the CPU's caches: 512 keys of 64 sequences take 25 times as long as 64.
_DECODE_KEYS = 1024  # over all sequences
_LEAST_DECODE_KEYS = 64
_MOST_DECODE_KEYS = 512
_LAST_DECODE_KEYS = 128  # what large blocks leave of a context is read in blocks of this many
_PREFILL_KEYS = 256
_PREFILL_QUERIES = 128
# Up to this many rows are scored as sums over the keys where they lie, and not as a product.
_FEW_ROWS = 8
# Start of the running maximum: below every real score, and finite, so that differences of two of
# them are 0 and not NaN.
_LOWEST = -1e30


class _Cache(NamedTuple):
    """Where keys and values lie, and how they are scored."""

    key_pages: Pages
    value_pages: Pages
    scale: float
    sliding_window: int | None
    soft_cap: float | None


def paged_attention_xla(
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
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Attends blockwise; arguments and result are those of `paged_attention_reference`."""
    cache = _Cache(key_pages, value_pages, scale, sliding_window, soft_cap)
    form = _few_queries if max_query_length <= _FEW_QUERIES else _many_queries
    return form(
        query,
        cache,
        block_tables,
        query_starts,
        kv_lengths,
        sinks,
        max_query_length,
    )


def _few_queries(
    query: Float[Array, "tokens heads head_dim"],
    cache: _Cache,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs+1"],
    kv_lengths: Int[Array, " seqs"],
    sinks: Float[Array, " heads"] | None,
    max_query_length: int,
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Computes all sequences at once, each padded to max_query_length queries."""
    tokens = query.shape[0]
    # A product with a single row converts the whole other operand to float32 on XLA:CPU.
    single_row = query.shape[1] == cache.key_pages.shape[2] and max_query_length == 1
    queries = 2 if single_row else max_query_length

    lane = jnp.arange(queries, dtype=jnp.int32)
    token = query_starts[:-1, None] + lane[None, :]
    real = token < query_starts[1:, None]
    position = kv_lengths[:, None] - query_starts[1:, None] + token
    padded = query.at[token].get(mode="fill", fill_value=0)
    keys = max(_LEAST_DECODE_KEYS, min(_DECODE_KEYS // kv_lengths.shape[0], _MOST_DECODE_KEYS))
    sizes = keys, min(keys, _LAST_DECODE_KEYS)
    output, log_sum_exp = _attend(
        padded, position, real, block_tables, kv_lengths, sinks, cache, sizes
    )
    # Lanes past a sequence's end would land on rows of the next one, in no defined order.
    target = jnp.where(real, token, tokens)
    return (
        jnp.zeros_like(query).at[target].set(output.astype(query.dtype), mode="drop"),
        jnp.full(query.shape[:2], -jnp.inf).at[target].set(log_sum_exp, mode="drop"),
    )


def _many_queries(
    query: Float[Array, "tokens heads head_dim"],
    cache: _Cache,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs+1"],
    kv_lengths: Int[Array, " seqs"],
    sinks: Float[Array, " heads"] | None,
    max_query_length: int,
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Computes one block of one sequence's queries after another, and padding costs nothing.

    Blocks have one of two sizes: what is left of a sequence, and all of one that decodes beside
    prompts, is computed in a small block where it fits.
    """
    tokens, heads = query.shape[:2]
    large = min(max_query_length, _PREFILL_QUERIES)
    lengths = jnp.diff(query_starts)
    left = lengths % large
    small = ((left > 0) & (left <= _FEW_QUERIES)).astype(jnp.int32)
    dtype, bits = query.dtype, jnp.pad(as_bits(query), ((0, large), (0, 0), (0, 0)))

    def work(
        size: int, origin: Array, ends: Array, item: Array, results: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        seq = jnp.sum(ends <= item)
        start = origin[seq] + item * size
        token = start + jnp.arange(size, dtype=jnp.int32)
        real = token < query_starts[seq + 1]
        position = kv_lengths[seq] - query_starts[seq + 1] + token
        output, log_sum_exp = _attend(
            from_bits(jax.lax.dynamic_slice_in_dim(bits, start, size), dtype)[None],
            position[None],
            real[None],
            block_tables[seq][None],
            kv_lengths[seq][None],
            sinks,
            cache,
            (_PREFILL_KEYS,),
        )

        def put(result: Array, rows: Array) -> Array:
            before = jax.lax.dynamic_slice_in_dim(result, start, size)
            mine = real.reshape(-1, *(1,) * (rows.ndim - 1))
            rows = jnp.where(mine, rows, before)
            return jax.lax.dynamic_update_slice_in_dim(result, rows, start, 0)

        return put(results[0], as_bits(output[0].astype(dtype))), put(results[1], log_sum_exp[0])

    results = jnp.zeros_like(bits), jnp.full((tokens + large, heads), -jnp.inf)
    for size, first, blocks in (
        (large, query_starts[:-1], -(-lengths // large) - small),
        (_FEW_QUERIES, query_starts[1:] - left, small),
    ):
        ends = jnp.cumsum(blocks)
        origin = first - (ends - blocks) * size  # where a sequence's item 0 would start
        run = functools.partial(work, size, origin, ends)
        results = jax.lax.fori_loop(0, ends[-1], run, results)
    output, log_sum_exp = results
    return from_bits(output[:tokens], dtype), log_sum_exp[:tokens]


def _attend(
    query: Float[Array, "seqs queries heads head_dim"],
    position: Int[Array, "seqs queries"],
    real: Bool[Array, "seqs queries"],
    block_tables: Int[Array, "seqs pages_per_seq"],
    kv_lengths: Int[Array, " seqs"],
    sinks: Float[Array, " heads"] | None,
    cache: _Cache,
    block_keys: tuple[int, ...],
) -> tuple[Float[Array, "seqs queries heads head_dim"], Float[Array, "seqs queries heads"]]:
    """Attends from `queries` tokens of every sequence, those that are real, to its keys.

    Keys are read in blocks of the first of `block_keys` as long as they fill one, then of the next.
    Each sequence starts at the first block, of the last size, with a visible key; the loops run as
    often as the sequence with most keys needs. Results are float32.
    """
    seqs, queries, heads, head_dim = query.shape
    page_size, kv_heads = cache.key_pages.shape[1:3]
    group = heads // kv_heads
    rows = group * queries

    # Keys that some real query sees lie in [low, high).
    high = jnp.minimum(jnp.max(jnp.where(real, position, -1), axis=1) + 1, kv_lengths)
    low = jnp.zeros_like(high)
    if cache.sliding_window is not None:
        first = jnp.min(jnp.where(real, position, jnp.iinfo(jnp.int32).max), axis=1)
        low = jnp.maximum(first - cache.sliding_window + 1, 0)
    pages_per_block = [min(max(keys // page_size, 1), block_tables.shape[1]) for keys in block_keys]
    last = pages_per_block[-1]
    first_page = low // (last * page_size) * last
    left = jnp.maximum(jnp.max(-(-high // page_size) - first_page), 0)

    by_head = query.reshape(seqs, queries, kv_heads, group, head_dim)
    by_head = by_head.transpose(0, 2, 3, 1, 4).reshape(seqs, kv_heads, rows, head_dim)
    row_position = jnp.where(real, position, -1)

    def step(
        pages: int, begin: Array, block: Array, carry: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        running, weighted = carry
        size = pages * page_size
        first = begin + block * pages
        page = first[:, None] + jnp.arange(pages)[None, :]
        table = jnp.take_along_axis(block_tables, page, axis=1, mode="clip")
        key_position = first[:, None] * page_size + jnp.arange(size)[None, :]
        live = (key_position >= low[:, None]) & (key_position < high[:, None])
        # 0 times NaN is NaN, so what nobody sees leaves the values and not only the scores.
        # Without this tie to the loop, jax 0.10.2 gathers bfloat16 pages by converting the whole
        # cache to float32 before the loop.
        key_pages, value_pages, table = jax.lax.optimization_barrier(
            (cache.key_pages, cache.value_pages, table)
        )
        keys = _read(key_pages, table, live, query.dtype)
        # A 1 behind each value: the same product sums the weights.
        values = _read(value_pages, table, live, query.dtype)
        values = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)

        seen = live[:, None, :] & (key_position[:, None, :] <= row_position[:, :, None])
        if cache.sliding_window is not None:
            seen &= key_position[:, None, :] > row_position[:, :, None] - cache.sliding_window
        scores = _score(by_head, keys) * cache.scale
        if cache.soft_cap is not None:
            scores = cache.soft_cap * jnp.tanh(scores / cache.soft_cap)
        scores = scores.reshape(seqs, kv_heads, group, queries, size)
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        scores = scores.reshape(seqs, kv_heads, rows, size)

        highest = jnp.maximum(running, scores.max(axis=-1))
        weights = jnp.exp(scores - highest[..., None]).astype(values.dtype)
        rescale = jnp.exp(running - highest)
        new = _batched_dot(weights, values, 2)
        return highest, weighted * rescale[..., None] + new

    if sinks is None:
        running = jnp.full((seqs, kv_heads, rows), _LOWEST)
        weighted = jnp.zeros((seqs, kv_heads, rows, head_dim + 1))
    else:
        # A sink is a score whose value is 0: it starts the maximum and the sum.
        sink = sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1)
        sink = jnp.broadcast_to(sink, (seqs, kv_heads, group, queries))
        running = sink.reshape(seqs, kv_heads, rows)
        weighted = jnp.zeros((seqs, kv_heads, rows, head_dim + 1)).at[..., head_dim].set(1)
    carry = running, weighted
    for pages in dict.fromkeys(pages_per_block):
        # All blocks of the last size, and as many of a larger one as are full.
        blocks = -(-left // pages) if pages == last else left // pages
        carry = jax.lax.fori_loop(0, blocks, functools.partial(step, pages, first_page), carry)
        first_page, left = first_page + blocks * pages, left - blocks * pages
    running, weighted = carry

    total = weighted[..., head_dim]
    attended = weighted[..., :head_dim] / total[..., None]
    by_token = attended.reshape(seqs, kv_heads, group, queries, head_dim).transpose(0, 3, 1, 2, 4)
    log_sum_exp = (running + jnp.log(total)).reshape(seqs, kv_heads, group, queries)
    log_sum_exp = log_sum_exp.transpose(0, 3, 1, 2).reshape(seqs, queries, heads)
    sees = (row_position >= 0)[:, :, None]
    by_token = by_token.reshape(seqs, queries, heads, head_dim)
    return (
        jnp.where(sees[..., None], by_token, 0),
        jnp.where(sees, log_sum_exp, -jnp.inf),
    )


def _read(
    pages: Pages,
    table: Int[Array, "seqs pages_per_block"],
    live: Bool[Array, "seqs positions"],
    dtype: jnp.dtype,
) -> Float[Array, "seqs kv_heads positions head_dim"]:
    """Lays pages end to end, head-major, with 0 where no key is live.

    Ids that name no page read some page; its positions are not live.
    """
    seqs, pages_per_block = table.shape
    _, page_size, kv_heads, head_dim = pages.shape
    block = pages.at[table].get(mode="clip")
    block = block.reshape(seqs, pages_per_block * page_size, kv_heads, head_dim)
    block = jnp.where(live[:, None, :, None], block.transpose(0, 2, 1, 3), 0)
    return unpacked(block, dtype)


def _score(
    query: Float[Array, "seqs kv_heads rows head_dim"],
    keys: Float[Array, "seqs kv_heads positions head_dim"],
) -> Float[Array, "seqs kv_heads rows positions"]:
    """Multiplies every row with every key, with float32 sums.

    For a product XLA:CPU lays the keys out anew and calls a library, which takes longer than few
    rows do. One reduction with a result for each row reads the keys once, in the loop that brings
    them from their pages; it is vectorised in programs that may reorder sums.
    """
    rows = query.shape[2]
    if rows == 1 or rows > _FEW_ROWS:  # a single result would be handed to the library again
        return _batched_dot(query, keys, 3)
    wide, zero = keys.astype(jnp.float32), jnp.zeros((), jnp.float32)
    products = [query[:, :, row, None].astype(jnp.float32) * wide for row in range(rows)]
    add = lambda *sums: jax.tree.map(operator.add, *sums)
    return jnp.stack(jax.lax.reduce(products, [zero] * rows, add, (3,)), axis=2)


def _batched_dot(
    left: Float[Array, "seqs kv_heads rows inner"],
    right: Float[Array, "seqs kv_heads _ _"],
    contract: int,
) -> Float[Array, "seqs kv_heads rows _"]:
    """Multiplies over the last axis of left and axis `contract` of right, with float32 sums."""
    dimensions = (((3,), (contract,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(left, right, dimensions, preferred_element_type=jnp.float32)
