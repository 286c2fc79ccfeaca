"""How the TPU kernel of paged attention sees one call: rows, products, and pages in memory.

Knows static facts only; no array passes through.
"""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.paged_attention.tpu_tiles import LANES, Tiles


class Layout(NamedTuple):
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
        """Query heads whose scores one product makes."""
        return self.packs * self.packing * self.group // self.products

    @property
    def rows(self) -> int:
        """Rows of a product: (query, head)."""
        return self.tiles.block_q * self.heads_per_product

    @property
    def columns_per_key(self) -> int:
        """Columns of a product for every key: one per pack, if packs are merged."""
        return self.packs // self.products

    @property
    def width(self) -> int:
        """Numbers of one key in all kv heads of a pack."""
        return self.packing * self.head_dim

    @property
    def block_keys(self) -> int:
        """Keys that are read at once."""
        return self.tiles.pages_per_block * self.page_size


def page_shape(layout: Layout, dtype: jnp.dtype) -> tuple[int, ...]:
    """Returns the shape of one page as the kernel reads it: a view of what XLA keeps."""
    packs, width = layout.packs, layout.width
    # Rows of one lane tile lie one after another unless they are padded; wider ones only in
    # whole tiles of 8 rows. XLA drops a lone head from the tiles of 16 bit arrays.
    whole = packs % 8 == 0 or (packs == 1 and jnp.dtype(dtype).itemsize == 2)
    if whole or (width == LANES and packs in (1, 2, 4)):
        return (layout.page_size * packs, width)
    return (layout.page_size, packs, width)


def is_staged(layout: Layout, dtype: jnp.dtype) -> bool:
    """Returns whether the keys of the kv heads are taken apart by way of a float32 copy."""
    apart = not layout.merged and layout.packs > 1 and layout.width % LANES == 0
    return apart and not is_strided(layout, dtype)


def is_strided(layout: Layout, dtype: jnp.dtype) -> bool:
    """Returns whether every n-th row of a block can be loaded as it lies."""
    flat = len(page_shape(layout, dtype)) == 2
    return flat and jnp.dtype(dtype).itemsize == 4 and layout.width == LANES
