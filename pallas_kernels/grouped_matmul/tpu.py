"""The grouped matrix product through Pallas for TPUs: each group's matrix streams past its rows.

Knows no experts and no other backend; group sizes reach it as numbers read ahead of the blocks.
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.row_tiles import row_tiles, tile_count
from pallas_kernels.tuning import bucket, find_tiles

_LANES = 128
# Rows of a tile are multiplied in chunks; a chunk without a row of the group is skipped.
_CHUNK = 128
# Columns that are summed at once; keeps what is between registers and memory small.
_COLUMN_CHUNK = 1024
# Blocks and scratch; a v5e gives a kernel 16 MiB, and the compiler wants some for itself.
_VMEM_BYTES = 12 * 2**20
# A guess: what a v5e could read in the time that one grid step costs beside its copies.
_STEP_BYTES = 256 * 2**10


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What one grid step multiplies; an axis that is shorter than its tile is not tiled.

    Attributes:
      rows: rows, of one group or several.
      out: columns of the result; gated, as many gates and as many values.
      inputs: length of the partial sums.

    Raises:
      ValueError: a tile is not made of whole vector registers.
    """

    rows: int
    out: int
    inputs: int

    def __post_init__(self) -> None:
        if any(size < 1 or size % _LANES for size in (self.rows, self.out, self.inputs)):
            raise ValueError(
                f"grouped_matmul 'tpu': every tile must be a positive multiple of {_LANES}, "
                f"got {self}"
            )


def grouped_matmul_tpu(
    rows: Float[Array, "rows in"],
    weights: Float[Array, "groups out in"],
    group_sizes: Int[Array, " groups"],
    row_weights: Float[Array, " rows"] | None,
    *,
    gated: bool,
    tiles: Tiles | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> Float[Array, "rows products"]:
    """Multiplies tile by tile; arguments and result are those of `grouped_matmul_reference`.

    The rows stay where they are. A work item is a tile of rows and a group that has rows in it;
    items that share a tile follow each other, and each writes its own rows of the result:

        rows     a a a a | a b b c | c c . . | . . . .        tiles of 4
        items    0 a     | 1 a     | 4 c     | 6 zeros
                         | 2 b     | 5 zeros |
                         | 3 c     |

    The grid is (tiles of columns, items, tiles of inputs), and only the items that there are. A
    matrix that fits into one tile of inputs is read once per call: the next item of its group
    finds it in place. Scalar prefetch over pairs of a tile and a group is the idea of megablox
    in jax, after MegaBlocks (Gale et al., arXiv:2211.15841).

    Args:
      tiles: None: measured ones if there are any, else a guess (`choose_tiles`).
      interpret: True or InterpretParams to run on a CPU.

    Raises:
      ValueError: the rows are float16, which the matrix unit does not take; or gated weights that
        lie turned in memory (`_turned`) are given tiles of less than all columns.
    """
    count, inputs = rows.shape
    groups = weights.shape[0]
    if str(rows.dtype) not in ("float32", "bfloat16"):
        raise ValueError(
            f"grouped_matmul 'tpu' multiplies float32 or bfloat16, got {rows.dtype}; cast the "
            "rows and weights"
        )
    if tiles is None:
        tiles, _ = choose_tiles(count, groups, weights.shape[1], inputs, str(rows.dtype), gated)
    parts = 2 if gated else 1
    products = weights.shape[1] // parts
    row_tile, out_tile, in_tile = _clip(tiles, count, products, inputs)
    in_tiles = pl.cdiv(inputs, in_tile)
    turned = _turned(weights.shape[1], inputs)
    if turned and gated and out_tile < products:
        raise ValueError(
            f"grouped_matmul 'tpu': gated weights {weights.shape} lie turned in memory and take "
            f"a tile of all columns, got {tiles} for {products} columns"
        )
    items, item_count = _work_items(group_sizes, count, row_tile)

    def input_step(item: Any, step: Any, items: _Items) -> Any:
        # An item without rows asks for the blocks that are there already.
        return jnp.where(items.first[item] < items.end[item], step, in_tiles - 1)

    def rows_block(_: Any, item: Any, step: Any, *prefetched: Any) -> tuple[Any, ...]:
        items = _Items(*prefetched)
        return items.source[item], input_step(item, step, items)

    def row_weights_block(_: Any, item: Any, step: Any, *prefetched: Any) -> tuple[Any, ...]:
        return 0, _Items(*prefetched).source[item]

    def weights_block(out: Any, item: Any, step: Any, *prefetched: Any) -> tuple[Any, ...]:
        items = _Items(*prefetched)
        place = (out, input_step(item, step, items))
        return items.group[item], 0, *(reversed(place) if turned else place)

    def result_block(out: Any, item: Any, step: Any, *prefetched: Any) -> tuple[Any, ...]:
        return _Items(*prefetched).tile[item], out

    if turned:  # one matrix of all columns; gates and values are told apart in the sums
        matrices = weights.swapaxes(1, 2)[:, None]
        weight_tile, sums = (in_tile, parts * out_tile), (1, row_tile, parts * out_tile)
    else:  # gates and values as two matrices: the same bytes if each has whole registers
        matrices = weights.reshape(groups, parts, products, inputs)
        weight_tile, sums = (out_tile, in_tile), (parts, row_tile, out_tile)
    in_specs = [
        pl.BlockSpec((row_tile, in_tile), rows_block),
        pl.BlockSpec((None, matrices.shape[1], *weight_tile), weights_block),
    ]
    arguments = [rows, matrices]
    if row_weights is not None:
        in_specs.append(pl.BlockSpec((1, row_tile), row_weights_block))
        arguments.append(row_weights.reshape(1, count))
    return pl.pallas_call(
        functools.partial(_kernel, inputs=inputs, in_tiles=in_tiles, gated=gated, turned=turned),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(items),
            grid=(pl.cdiv(products, out_tile), item_count, in_tiles),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((row_tile, out_tile), result_block),
            scratch_shapes=[pltpu.VMEM(sums, jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((count, products), rows.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="grouped_matmul_tpu",
    )(*items, *arguments)


def choose_tiles(
    rows: int, groups: int, out: int, inputs: int, dtype: str, gated: bool
) -> tuple[Tiles, bool]:
    """Returns tiles for arguments of these sizes, and whether they were measured.

    The key of a measurement is "bfloat16 64x2048x1408 gated rows 512": dtype, groups x out x in as
    the weights have them, "gated" or "plain", and the power of two at or above the rows.

    A guess minimises the bytes read, with an amount of bytes for each grid step, among the tiles
    that fit into the memory of the core.
    """
    form = "gated" if gated else "plain"
    key = f"{dtype} {groups}x{out}x{inputs} {form} rows {bucket(rows)}"
    measured = find_tiles("grouped_matmul", "tpu", key)
    if measured is not None:
        return Tiles(**measured), True
    parts, size = (2 if gated else 1), jnp.dtype(dtype).itemsize
    products, used = out // parts, min(groups, rows)

    def cost(tiles: Tiles) -> tuple[float | int, int]:
        row_tile, out_tile, in_tile = _clip(tiles, rows, products, inputs)
        vmem = 2 * size * (row_tile * (in_tile + out_tile) + parts * out_tile * in_tile)
        vmem += 4 * parts * row_tile * out_tile
        if size == 4:  # the compiler splits float32 factors into three of bfloat16
            vmem += 6 * (min(row_tile, _CHUNK) + out_tile) * in_tile
        out_tiles, in_tiles = pl.cdiv(products, out_tile), pl.cdiv(inputs, in_tile)
        items = tile_count(rows, groups, row_tile, aligned=True)
        # With one tile of inputs, neighbours find what they share in place; else they do not.
        matrices, row_reads = (used, pl.cdiv(rows, row_tile)) if in_tiles == 1 else (items, items)
        lines = matrices * parts * products + out_tiles * row_reads * row_tile
        steps = out_tiles * items * in_tiles
        first = (row_tile + parts * out_tile) * in_tile * size  # nothing runs beside this copy
        read = lines * in_tiles * in_tile * size + first + steps * _STEP_BYTES
        return (read if vmem <= _VMEM_BYTES else math.inf), vmem

    def even(size: int) -> set[int]:
        return {pl.cdiv(size, count * _LANES) * _LANES for count in range(1, 33)}

    whole = gated and _turned(out, inputs)
    columns = {pl.cdiv(products, _LANES) * _LANES} if whole else even(products)
    choices = itertools.product((128, 256, 512, 1024), columns, even(inputs))
    return min((Tiles(rows=r, out=o, inputs=i) for r, o, i in choices), key=cost), False


def _turned(out: int, inputs: int) -> bool:
    """Whether XLA keeps [out, in] matrices with `out` along the lanes, since that pads less.

    It does so with the arguments of a program. Read as [in, out] they need no copy; the rule is a
    guess at XLA's, and where it is wrong, only a copy is lost.
    """
    sublanes, lanes = 8, _LANES
    as_named = pl.cdiv(out, sublanes) * pl.cdiv(inputs, lanes)
    return pl.cdiv(inputs, sublanes) * pl.cdiv(out, lanes) < as_named


def _clip(tiles: Tiles, rows: int, products: int, inputs: int) -> tuple[int, int, int]:
    return min(tiles.rows, rows), min(tiles.out, products), min(tiles.inputs, inputs)


class _Items(NamedTuple):
    """Pairs of a tile and a group with rows in it, then those of tiles and the rows past the last.

    Rows first <= row < end are the item's own. An item past the last group has none, and names the
    group and the source of the last item that has some, so that nothing is fetched for it.
    """

    group: Any
    tile: Any  # of the result
    source: Any  # the tile of rows to have in place
    first: Any
    end: Any


def _work_items(group_sizes: Array, rows: int, row_tile: int) -> tuple[_Items, Array]:
    """Lists the items in the order of the rows; the second result says how many there are."""
    group, first, end = row_tiles(group_sizes, rows, row_tile, aligned=True)
    used = (group < group_sizes.shape[0]) & (first < end)
    tile = first // row_tile
    source = jnp.where(used, tile, jnp.max(jnp.where(used, tile, 0)))
    group = jnp.where(used, group, jnp.max(jnp.where(used, group, 0)))
    count = jnp.sum(first < end, dtype=jnp.int32)
    return _Items(group, tile, source, first, jnp.where(used, end, first)), count


def _kernel(
    *refs: Any,
    inputs: int,
    in_tiles: int,
    gated: bool,
    turned: bool,
) -> None:
    """Adds a tile of inputs to the sums of a work item, and writes them after the last one.

    Args:
      refs: the items, rows, weights, row weights if there are any, the result, the sums.
    """
    items = _Items(*refs[: len(_Items._fields)])
    rows_ref, weights_ref, *row_weights_ref, out_ref, sums_ref = refs[len(items) :]
    item, step = pl.program_id(1), pl.program_id(2)
    tile, first, end = items.tile[item], items.first[item], items.end[item]
    (row_tile, in_tile), out_tile = rows_ref.shape, out_ref.shape[1]
    tail = inputs % in_tile
    column_chunks = [
        pl.ds(start, min(_COLUMN_CHUNK, sums_ref.shape[2] - start))
        for start in range(0, sums_ref.shape[2], _COLUMN_CHUNK)
    ]

    @pl.when((step == 0) & ((item == 0) | (tile != items.tile[jnp.maximum(item - 1, 0)])))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def without_tail(block: Array, axis: int) -> Array:
        if not tail:
            return block
        # Past the inputs lies anything at all, NaN included: both factors have to go.
        position = step * in_tile + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
        # The compiler has no masks for halves of packed registers.
        wide = block if block.shape[0] % 16 == 0 else block.astype(jnp.float32)
        return jnp.where(position < inputs, wide, jnp.zeros_like(wide)).astype(block.dtype)

    def multiply(start: int, size: int) -> None:
        chunk = pl.ds(start, size)
        block = without_tail(rows_ref[chunk, :], 1)
        for part, columns in itertools.product(range(sums_ref.shape[0]), column_chunks):
            index = (part, slice(None), columns) if turned else (part, columns)
            product = jax.lax.dot_general(
                block,
                without_tail(weights_ref[index], 0 if turned else 1),
                (((1,), (0 if turned else 1,)), ((), ())),
                precision="highest" if block.dtype == jnp.float32 else "default",
                preferred_element_type=jnp.float32,
            )
            before = jnp.where(step == 0, 0, sums_ref[part, chunk, columns])
            sums_ref[part, chunk, columns] = before + product

        @pl.when(step == in_tiles - 1)
        def _():
            product = sums_ref[0, chunk, :out_tile]
            if gated:
                values = sums_ref[0, chunk, out_tile:] if turned else sums_ref[1, chunk, :]
                product = jax.nn.silu(product) * values
            if row_weights_ref:
                product = product * row_weights_ref[0][:, chunk].T
            row = tile * row_tile + start + jax.lax.broadcasted_iota(jnp.int32, product.shape, 0)
            own = (first <= row) & (row < end)
            out_ref[chunk, :] = jnp.where(own, product.astype(out_ref.dtype), out_ref[chunk, :])

    for start in range(0, row_tile, _CHUNK):
        size = min(_CHUNK, row_tile - start)
        here = tile * row_tile + start
        pl.when((first < here + size) & (here < end))(functools.partial(multiply, start, size))
