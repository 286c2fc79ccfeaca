"""The grouped matrix product from XLA operations: one block of one group's rows after another.

Knows no tuning: the block is a guess from the average group. On XLA:CPU an indexed bank of
weights is slow in every form; there, keep one array per group and call plain products.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_SMALLEST_BLOCK = 8
_LARGEST_BLOCK = 256


def rows_per_block(rows: int, groups: int) -> int:
    """Returns the block for this many rows: the average group, rounded up to a power of two."""
    average = -(-rows // groups)
    return min(max(1 << (average - 1).bit_length(), _SMALLEST_BLOCK), _LARGEST_BLOCK)


def grouped_matmul_xla(
    rows: Float[Array, "rows in"],
    weights: Float[Array, "groups out in"],
    group_sizes: Int[Array, " groups"],
    row_weights: Float[Array, " rows"] | None,
    *,
    gated: bool,
) -> Float[Array, "rows products"]:
    """Multiplies block by block; arguments and result are those of `grouped_matmul_reference`.

    Every block starts at a row of its group, is read past the group's end where the group is no
    multiple of the block, and is overwritten there by the blocks that follow:

        rows      a a a a a b b c c c        blocks of 4    a a a a | a . . . | b b . . | c c c .

    The trip count is the number of blocks that hold rows, so empty groups cost nothing.
    """
    count, groups = rows.shape[0], weights.shape[0]
    size = rows_per_block(count, groups)
    group_sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // size)
    block_ends = jnp.cumsum(blocks)
    padded = jnp.pad(rows, ((0, size), (0, 0)))
    lane = jnp.arange(size, dtype=jnp.int32)

    def work(block: Array, products: Array) -> Array:
        group = jnp.sum(block_ends <= block)
        first = ends[group] - group_sizes[group]
        start = first + (block - block_ends[group] + blocks[group]) * size
        weight = jax.lax.dynamic_index_in_dim(weights, group, keepdims=False)
        product = jax.lax.dot_general(
            jax.lax.dynamic_slice_in_dim(padded, start, size),
            weight,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if gated:
            gate, up = jnp.split(product, 2, axis=1)
            product = jax.nn.silu(gate) * up
        product = jnp.where((start + lane < ends[group])[:, None], product, 0)
        return jax.lax.dynamic_update_slice_in_dim(products, product, start, 0)

    # Held in float32: jax 0.10.2 on a CPU rewrites all of a bfloat16 array to update a part of it.
    products = jnp.zeros((count + size, weights.shape[1] // (2 if gated else 1)))
    products = jax.lax.fori_loop(0, block_ends[-1], work, products)[:count]
    if row_weights is not None:
        in_a_group = jnp.arange(count) < ends[-1]
        products *= jnp.where(in_a_group, row_weights, 0)[:, None]
    return products.astype(rows.dtype)
