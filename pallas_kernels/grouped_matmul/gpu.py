"""The grouped matrix product on NVIDIA GPUs, through Pallas' Triton lowering.

Knows no measurements: tiles come from a table, or from a guess that says so.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.gpu_memory import shared_memory
from pallas_kernels.grouped_matmul.row_tiles import row_tile, tile_count
from pallas_kernels.tuning import bucket, find_tiles

# Programs that run at the same time should share rows and weights in the L2 cache: this many rows
# are taken through all their matrices before the next ones.
_ROWS_TOGETHER = 1024


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What one program computes, all powers of two.

    Attributes:
      rows: rows per tile, at least 16.
      out: products per tile, at least 16; a gated product reads twice as many rows of the matrix.
      inputs: numbers of a row, and of a row of the matrix, per step, at least 16.
      warps: warps of 32 threads per program.
      stages: steps whose reads are under way at the same time.
    """

    rows: int
    out: int
    inputs: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            smallest = 1 if name in ("warps", "stages") else 16
            power_of_two = value > 0 and value & (value - 1) == 0
            if value < smallest or not (power_of_two or name == "stages"):
                raise ValueError(
                    f"grouped_matmul cannot run its implementation 'gpu' with {name}={value}: "
                    f"tiles must be powers of two, of at least {smallest}"
                )


def tile_key(
    rows: int, groups: int, out: int, inputs: int, dtype: DTypeLike, *, gated: bool
) -> str:
    """Returns what tables of tiles are keyed by, such as "r512_g128_o1536_i2048_bfloat16_gated".

    The count of rows is the next power of two; `out` is the weights' axis, gated or not.
    """
    key = f"r{bucket(rows)}_g{groups}_o{out}_i{inputs}_{jnp.dtype(dtype)}"
    return key + "_gated" if gated else key


def choose_tiles(
    rows: int, groups: int, out: int, inputs: int, dtype: DTypeLike, *, gated: bool
) -> tuple[Tiles, bool]:
    """Returns tiles for a product of these sizes, and whether they were measured or guessed."""
    key = tile_key(rows, groups, out, inputs, dtype, gated=gated)
    measured = find_tiles("grouped_matmul", "gpu", key)
    if measured is not None:
        return Tiles(**measured), True
    memory = shared_memory()
    return guess_tiles(rows, groups, inputs, dtype, gated=gated, memory=memory), False


def guess_tiles(
    rows: int, groups: int, inputs: int, dtype: DTypeLike, *, gated: bool, memory: int
) -> Tiles:
    """Returns tiles that fit into this shared memory, in bytes, and should be reasonable.

    A tile holds twice the average group, so that most matrices are read once. Small tiles are a
    matter of reading weights: narrow, so that there are enough programs to fill the GPU, with
    long steps and many of them under way. Large ones are a matter of the tensor cores: as wide as
    registers allow. A gated tile has two sums per product, so half the products.
    """
    height = min(max(bucket(2 * rows // min(groups, rows)), 16), 128)
    if jnp.dtype(dtype).itemsize > 2:  # no tensor cores: sums and factors all go through registers
        height, width, step, warps, stages = min(height, 32), 64, 32, 4, 3
    elif height <= 32:
        width, step, warps, stages = 64, 128, 4, 4
    elif height == 64 or inputs < 2048:
        width, step, warps, stages = 128, 64, height // 16, 3
    else:  # One program per multiprocessor: fewer reads per product, if there are enough steps.
        width, step, warps, stages = 256, 64, 8, 3
    itemsize = jnp.dtype(dtype).itemsize
    while (height + width) * step * itemsize * stages > memory:
        width //= 2
    # A last step that is not full costs as much as a full one, and its reads are not under way.
    while step > 32 and inputs % step:
        step, stages = step // 2, stages + 1
    width = width // 2 if gated else width
    return Tiles(rows=height, out=width, inputs=step, warps=warps, stages=stages)


def grouped_matmul_gpu(
    rows: Float[Array, "rows in"],
    weights: Float[Array, "groups out in"],
    group_sizes: Int[Array, " groups"],
    row_weights: Float[Array, " rows"] | None,
    *,
    gated: bool,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "rows products"]:
    """Multiplies tile by tile; arguments and result are those of `grouped_matmul_reference`.

    A program computes one tile of rows, all of one group, times one block of products, and finds
    its tile in group_sizes by itself: there is one launch and no work beside it. As many programs
    start as could be needed; those that are not needed end at once. float32 is multiplied in
    float32, without tensor cores.

    Args:
      tiles: None: those of `choose_tiles`.
      interpret: whether to run as plain XLA operations, on any backend, slowly.

    Raises:
      ValueError: tiles that the kernel cannot use.
    """
    (count, inputs), (groups, out, _) = rows.shape, weights.shape
    if tiles is None:
        tiles, _ = choose_tiles(count, groups, out, inputs, rows.dtype, gated=gated)
    products = out // 2 if gated else out
    row_blocks = tile_count(count, groups, tiles.rows)
    out_blocks = pl.cdiv(products, tiles.out)
    operands = [group_sizes.astype(jnp.int32), rows, weights]
    if row_weights is not None:
        operands.append(row_weights)
    kernel = functools.partial(
        _kernel, tiles=tiles, row_blocks=row_blocks, out_blocks=out_blocks, gated=gated
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((count, products), rows.dtype),
        grid=(row_blocks * out_blocks,),
        compiler_params=pltriton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_matmul",
    )(*operands)


def _kernel(
    sizes_ref: Any,
    rows_ref: Any,
    weights_ref: Any,
    *row_weights_and_result: Any,
    tiles: Tiles,
    row_blocks: int,
    out_blocks: int,
    gated: bool,
) -> None:
    *row_weights_ref, result_ref = row_weights_and_result
    count, inputs = rows_ref.shape
    products = result_ref.shape[1]
    row_block, out_block = _place(pl.program_id(0), tiles.rows, row_blocks, out_blocks)

    group_count = weights_ref.shape[0]
    lane = jnp.arange(bucket(group_count), dtype=jnp.int32)
    sizes = sizes_ref[jnp.minimum(lane, group_count - 1)]
    sizes = jnp.where(lane < group_count, sizes, 0)
    group, first, end = row_tile(row_block, sizes, count, tiles.rows)

    row = first + jnp.arange(tiles.rows, dtype=jnp.int32)
    column = out_block * tiles.out + jnp.arange(tiles.out, dtype=jnp.int32)
    inside = (row < end)[:, None] & (column < products)[None, :]
    result = result_ref.at[pl.ds(first, tiles.rows), pl.ds(out_block * tiles.out, tiles.out)]

    # Reading the last row or column again needs no mask, and no other tile's numbers are read.
    row = jnp.minimum(row, end - 1)
    column = jnp.minimum(column, products - 1)
    halves = 2 if gated else 1

    def add_step(start: Any, sums: tuple[Array, ...], left: int) -> tuple[Array, ...]:
        ahead = jnp.arange(tiles.inputs, dtype=jnp.int32)[None, :]
        mask = ahead < left if left < tiles.inputs else None
        x = _load(rows_ref.at[row[:, None], start + ahead], mask)
        totals = []
        for half, total in enumerate(sums):
            place = weights_ref.at[group, (column + half * products)[:, None], start + ahead]
            totals.append(total + _dot(x, _load(place, mask)))
        return tuple(totals)

    @pl.when((first < end) & (group < group_count))
    def multiply() -> None:
        sums = tuple(jnp.zeros((tiles.rows, tiles.out), jnp.float32) for _ in range(halves))
        steps, left = divmod(inputs, tiles.inputs)
        sums = jax.lax.fori_loop(
            0, steps, lambda i, sums: add_step(i * tiles.inputs, sums, tiles.inputs), sums
        )
        if left:
            sums = add_step(steps * tiles.inputs, sums, left)
        product = jax.nn.silu(sums[0]) * sums[1] if gated else sums[0]
        if row_weights_ref:
            product *= row_weights_ref[0][row][:, None]
        pltriton.store(result, product.astype(result_ref.dtype), mask=inside)

    @pl.when((first < end) & (group >= group_count))
    def clear() -> None:
        zeros = jnp.zeros((tiles.rows, tiles.out), result_ref.dtype)
        pltriton.store(result, zeros, mask=inside)


def _place(program: Any, size: int, row_blocks: int, out_blocks: int) -> tuple[Any, Any]:
    """Returns the row block and the block of products of a program.

    _ROWS_TOGETHER rows pass through all products before the next rows begin; among those rows,
    neighbouring programs share a block of products, and with it the weights.
    """
    together = min(max(_ROWS_TOGETHER // size, 1), row_blocks)
    band, within = program // (together * out_blocks), program % (together * out_blocks)
    height = jnp.minimum(row_blocks - band * together, together)
    return band * together + within % height, within // height


def _load(ref: Any, mask: Array | None) -> Array:
    return pltriton.load(ref, mask=mask, other=None if mask is None else 0)


def _dot(x: Array, weight: Array) -> Array:
    # Without "highest", Triton would round float32 to TF32.
    precision = "highest" if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
