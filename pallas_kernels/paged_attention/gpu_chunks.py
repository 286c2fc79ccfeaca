"""Heads of any width in Triton's arrays, which are as wide as powers of two.

Knows how to read and write a part of many heads at once, and not what for.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array

from pallas_kernels.paged_attention.gpu_tiles import SMALLEST


class Chunk(NamedTuple):
    """A part of head_dim as wide as a power of two; columns past `real` are padding."""

    start: int
    width: int
    real: int


def chunks_of(head_dim: int) -> tuple[Chunk, ...]:
    """Cuts head_dim into powers of two, widest first: 192 is 128 and 64.

    Triton's arrays are as wide as powers of two; cutting wastes less than padding.
    """
    chunks, start = [], 0
    while start < head_dim:
        left = head_dim - start
        width = max(SMALLEST, 1 << (left.bit_length() - 1))
        chunks.append(Chunk(start, width, min(left, width)))
        start += width
    return tuple(chunks)


def _at(ref: Any, place: tuple[Array, ...], chunk: Chunk, mask: Array) -> tuple[Any, Array]:
    """Points at a chunk of the heads that each row of `place` names."""
    column = jnp.arange(chunk.width, dtype=jnp.int32)[None, :]
    rows = (index[:, None] if index.ndim else index for index in place)
    mask = mask[:, None]
    if chunk.real < chunk.width:
        mask &= column < chunk.real
    mask = jnp.broadcast_to(mask, (mask.shape[0], chunk.width))
    return ref.at[(*rows, chunk.start + column)], mask


def load_chunk(ref: Any, place: tuple[Array, ...], chunk: Chunk, mask: Array) -> Array:
    """Returns [rows chunk.width]: that chunk of each row's head, 0 where the mask is False."""
    where, mask = _at(ref, place, chunk, mask)
    return pltriton.load(where, mask=mask, other=0)


def store_chunk(
    ref: Any, place: tuple[Array, ...], chunk: Chunk, values: Array, mask: Array
) -> None:
    """Writes the rows of `values` for which the mask is True; the opposite of `load_chunk`."""
    where, mask = _at(ref, place, chunk, mask)
    pltriton.store(where, values.astype(ref.dtype), mask=mask)
