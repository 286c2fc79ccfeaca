"""How the GPU kernel of paged attention cuts its work: measured where it was, guessed elsewhere.

Knows static shapes, not arrays; the kernel itself is `pallas_kernels.paged_attention.gpu`.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from pallas_kernels.gpu_memory import shared_memory
from pallas_kernels.tuning import bucket, find_tiles

# What Triton's matrix products need in each dimension.
SMALLEST = 16
# Programs that keep a large GPU (132 multiprocessors) busy to the end: decode waits for memory and
# wants several at once on each, prefill works from registers and has room for one or two.
_ENOUGH_SMALL_PROGRAMS = 1024
_ENOUGH_LARGE_PROGRAMS = 256
# Fewer keys than this are not worth a program and a merge of their own.
FEWEST_KEYS_PER_SPLIT = 256
# The merge holds one row of every split.
_MOST_SPLITS = 64
# Rows of a prefill program: more reuse every key more often and need more registers.
_MOST_ROWS = 128
_MANY_ROWS = 64  # what Hopper's wide matrix instructions take


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes of one launch.

    Attributes:
      rows: of a program: query tokens times the heads that share a kv head, padded; a power of
        two, at least 16.
      block_k: key positions per step of the loop; a power of two, at least 16.
      splits: programs that share the keys of one query tile, a power of two up to 64; their results
        are merged after.
      warps: per program.
      stages: of the software pipeline over the loop.
    """

    rows: int
    block_k: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The static facts of a call that decide its tiles; `dtype` is the name of query's dtype."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    tokens: int
    seqs: int
    pages_per_seq: int
    max_query_length: int
    sliding_window: int | None = None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    @property
    def reach(self) -> int:
        """The most keys that the queries of one sequence can see."""
        capacity = self.pages_per_seq * self.page_size
        if self.sliding_window is None:
            return capacity
        return min(capacity, self.sliding_window + self.max_query_length - 1)

    @property
    def key(self) -> str:
        """What tables of tiles call it: counts that vary from call to call are in buckets."""
        return (
            f"{self.dtype} heads={self.heads}/{self.kv_heads} dim={self.head_dim} "
            f"page={self.page_size} tokens={bucket(self.tokens)} seqs={bucket(self.seqs)} "
            f"queries={bucket(self.max_query_length)} keys={bucket(self.reach)}"
        )

    @property
    def fewest_rows(self) -> int:
        """Rows that hold one query token of every head in a group."""
        return max(SMALLEST, bucket(self.group))


def choose_tiles(workload: Workload) -> tuple[Tiles, bool]:
    """Returns tiles for a workload, and whether they were measured on this kind of device."""
    measured = find_tiles("paged_attention", "gpu", workload.key)
    if measured is not None:
        return Tiles(**measured), True
    return guess_tiles(workload, shared_memory()), False


def guess_tiles(workload: Workload, memory: int) -> Tiles:
    """Returns tiles that fit this shared memory, in bytes, and should be reasonable."""
    full = workload.dtype == "float32"  # no tensor cores: operands live in registers
    most = min(bucket(workload.max_query_length * workload.group), 32 if full else _MOST_ROWS)
    most = max(most, workload.fewest_rows)
    sizes = [
        (rows, block_k, stages)
        for stages in ((2,) if full else (3, 2))
        for block_k in ((32, 16) if full else (64, 32, 16))
        for rows in (most, most // 2)
        if rows >= workload.fewest_rows
    ]
    fitting = (size for size in sizes if shared_bytes(workload, *size) <= memory)
    rows, block_k, stages = next(fitting, sizes[-1])
    wide = workload.head_dim > 128 and rows >= _MANY_ROWS
    warps = 8 if wide or rows >= _MOST_ROWS or (full and rows > SMALLEST) else 4

    enough = _ENOUGH_SMALL_PROGRAMS if rows < _MANY_ROWS else _ENOUGH_LARGE_PROGRAMS
    programs = workload.kv_heads * item_count(workload, rows)
    useful = bucket(-(-workload.reach // FEWEST_KEYS_PER_SPLIT))
    splits = min(bucket(-(-enough // programs)), useful, _MOST_SPLITS)
    return Tiles(rows=rows, block_k=block_k, splits=splits, warps=warps, stages=stages)


def shared_bytes(workload: Workload, rows: int, block_k: int, stages: int) -> int:
    """Returns an upper bound on a program's shared memory.

    It holds the query rows and the keys and values of every step in flight. With many rows Hopper
    reads the operands of a running product from there as well; with few, warps exchange weights.
    """
    itemsize = jnp.dtype(workload.dtype).itemsize
    width = -(-workload.head_dim // SMALLEST) * SMALLEST * itemsize
    many = rows >= _MANY_ROWS
    buffers = stages if many else max(1, stages - 1)
    return width * (rows + 2 * block_k * buffers) + (0 if many else rows * block_k * itemsize)


def tile_queries(workload: Workload, rows: int) -> int:
    """Returns how many query tokens a tile holds."""
    return rows // workload.group


def item_count(workload: Workload, rows: int) -> int:
    """Returns a static bound on the query tiles of all sequences.

    A sequence of n queries has at most n // tile + 1 that are not empty.
    """
    tile = tile_queries(workload, rows)
    if workload.max_query_length <= tile:
        return workload.seqs
    return workload.tokens // tile + workload.seqs


def check_tiles(workload: Workload, tiles: Tiles) -> None:
    """Raises unless the kernel can run a workload with these tiles.

    Raises:
      ValueError: the message names the size and its limit.
    """
    limits = {
        "rows": (tiles.rows, workload.fewest_rows, 256),
        "block_k": (tiles.block_k, SMALLEST, 256),
        "splits": (tiles.splits, 1, _MOST_SPLITS),
        "warps": (tiles.warps, 1, 16),
    }
    for name, (size, low, high) in limits.items():
        if not low <= size <= high or size & (size - 1):
            raise ValueError(
                f"paged_attention on 'gpu': {name} must be a power of two from {low} to {high}, "
                f"got {size}"
            )
    if tiles.stages < 1:
        raise ValueError(f"paged_attention on 'gpu': stages must be at least 1, got {tiles.stages}")
