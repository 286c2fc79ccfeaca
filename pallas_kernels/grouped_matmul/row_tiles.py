"""Which rows every tile of a grouped product covers, and which group they belong to.

Knows neither weights nor a backend: group sizes are traced, the number of tiles is not.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class RowTiles(NamedTuple):
    """Rows first <= row < end belong to `group`; past the last group, to the number of groups."""

    group: Int[Array, "*tiles"]
    first: Int[Array, "*tiles"]
    end: Int[Array, "*tiles"]


def tile_count(rows: int, groups: int, size: int, *, aligned: bool = False) -> int:
    """Returns how many tiles are enough for every way to split this many rows into groups."""
    nonempty = min(groups + 1, rows)
    if aligned:
        return -(-rows // size) + nonempty - 1
    return (rows + nonempty * (size - 1)) // size


def row_tile(
    number: Int[Array, ""],
    group_sizes: Int[Array, " groups"],
    rows: int,
    size: int,
    *,
    aligned: bool = False,
) -> RowTiles:
    """Returns one tile of `row_tiles`; numbers past the last tile give first == end == rows.

    Only scans and reductions, so that a Triton kernel can find its own tile. Empty groups at the
    end of `group_sizes` change nothing but the group of rows past the last one.
    """
    group_ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = jnp.minimum(group_ends - group_sizes, rows)
    group_ends = jnp.minimum(group_ends, rows)  # wrong sizes must not lead outside the arrays
    origins = starts // size * size if aligned else starts
    tiles = jnp.where(starts < group_ends, (group_ends - origins + (size - 1)) // size, 0)
    tile_ends = jnp.cumsum(tiles, dtype=jnp.int32)

    # Everything that the groups before this tile's own hold; there may be no own group.
    before = tile_ends <= number
    group = jnp.sum(before.astype(jnp.int32))
    tiles_before = jnp.max(jnp.where(before, tile_ends, 0))
    start = jnp.max(jnp.where(before, group_ends, 0))
    group_end = jnp.min(jnp.where(before, rows, group_ends))

    origin = start // size * size if aligned else start
    origin += (number - tiles_before) * size
    first = jnp.minimum(jnp.maximum(origin, start), rows)
    return RowTiles(group, first, jnp.minimum(origin + size, group_end))


def row_tiles(
    group_sizes: Int[Array, " groups"], rows: int, size: int, *, aligned: bool = False
) -> RowTiles:
    """Cuts sorted rows into tiles of at most `size` rows, each of one group.

    Every group starts a tile of its own, and rows past the last group form a group more:

        rows                a a a a a b b c c c . .      group_sizes = 5, 2, 3, 0
        tiles of 4         |a a a a|a|b b|c c c|. .|
        aligned tiles of 4 |a a a a|a|b b|c|c c|. .|     (no tile crosses a multiple of 4)

    Empty groups own no tile, and every row lies in exactly one. Tiles that are not needed come
    last: they have first == end == rows, and the group of the last tile that has rows, so that
    nothing new need be fetched for them.

    Args:
      group_sizes: int32, not negative; their sum is at most `rows`.
      rows: the number of rows, in groups or not.
      size: rows per tile.
      aligned: whether tiles also end at every multiple of `size`, so that tile t lies in the block
        first[t] // size of an array cut into blocks of `size` rows.

    Returns:
      int32 arrays of `tile_count(...)` entries, in the order of the rows.
    """
    count = tile_count(rows, group_sizes.shape[0], size, aligned=aligned)
    numbers = jnp.arange(count, dtype=jnp.int32)
    group, first, end = jax.vmap(
        lambda number: row_tile(number, group_sizes, rows, size, aligned=aligned)
    )(numbers)
    last = jnp.max(jnp.where(first < end, group, 0))
    return RowTiles(jnp.minimum(group, last), first, end)
