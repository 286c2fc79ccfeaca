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

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.arguments import Pages
from pallas_kernels.paged_attention.tpu_kernel import attend_tile
from pallas_kernels.paged_attention.tpu_layout import Layout, is_staged, page_shape
from pallas_kernels.paged_attention.tpu_tiles import LANES, Tiles, choose_tiles, lane_packing

# Up to this many rows (queries times heads) are multiplied with the keys of all kv heads, and the
# scores of other heads masked: taking the heads' keys apart would cost more than those products.
_MERGED_ROWS = 128


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
    layout = Layout(
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
    page = page_shape(layout, query.dtype)
    blocks = (2, tiles.pages_per_block * page[0], *page[1:])
    columns = layout.block_keys * layout.packs
    staged = is_staged(layout, query.dtype)
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
        functools.partial(attend_tile, layout=layout, has_sinks=sinks is not None),
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
