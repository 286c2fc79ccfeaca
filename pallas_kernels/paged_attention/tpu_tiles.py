"""How the TPU kernel cuts paged attention up: kv heads into lanes, queries and pages into blocks.

Knows sizes, not the kernel's steps.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.tuning import bucket, find_tiles

LANES = 128
# Rows of scores per pack times packs; bounds the state of a tile, about 2 KiB a row in all.
_ROWS = 2048
_BLOCK_KEYS = 256
# Two blocks each of keys and values; a quarter of what a v5e kernel may use by default.
_PAGES_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of the blocks: queries of a tile, and pages that are read at once."""

    block_q: int
    pages_per_block: int

    def __post_init__(self) -> None:
        if min(self.block_q, self.pages_per_block) < 1:
            raise ValueError(f"tiles must be at least 1, got {self}")


def lane_packing(kv_heads: int, head_dim: int) -> int:
    """Returns how many kv heads side by side fill the 128 lanes without rest.

    1 where they fill them alone, and where kv_heads is no multiple of the number it would take:
    pages then have unused lanes, and are copied whole unless the caller fixed their layout.
    """
    packing = LANES // math.gcd(LANES, head_dim)
    return 1 if kv_heads % packing else packing


def tiles_key(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    pages_per_seq: int,
    max_query_length: int,
    dtype: jnp.dtype,
) -> str:
    """Returns the key of a call in the table of measured tiles."""
    return (
        f"{jnp.dtype(dtype)} heads={heads}/{kv_heads} head_dim={head_dim} page_size={page_size} "
        f"capacity={bucket(pages_per_seq * page_size)} queries={bucket(max_query_length)}"
    )


def choose_tiles(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    pages_per_seq: int,
    max_query_length: int,
    dtype: jnp.dtype,
) -> tuple[Tiles, bool]:
    """Returns the measured tiles for a call and True, or a guess and False.

    Raises:
      ValueError: the table of measured tiles cannot be read.
    """
    key = tiles_key(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_seq=pages_per_seq,
        max_query_length=max_query_length,
        dtype=dtype,
    )
    found = find_tiles("paged_attention", "tpu", key)
    if found is not None:
        return Tiles(**found), True
    width = max(head_dim, lane_packing(kv_heads, head_dim) * head_dim)
    block_q = min(max_query_length, max(_ROWS * LANES // (heads * width), 1))
    token_bytes = 4 * kv_heads * head_dim * jnp.dtype(dtype).itemsize
    block_keys = min(_BLOCK_KEYS, _PAGES_BYTES // token_bytes)
    pages_per_block = min(max(block_keys // page_size, 1), pages_per_seq)
    return Tiles(block_q=block_q, pages_per_block=pages_per_block), False
