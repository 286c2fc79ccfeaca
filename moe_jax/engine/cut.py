"""Cuts the arrays of an expert along ffn into those of its pieces, and joins them again.

Each piece is an expert of its own: gate_up [2 ffn, embed] with its rows of gate and of up, down
[embed, ffn] with its columns. Knows one array at a time, not where it goes.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from moe_jax.checkpoint.placing import aligned_buffer


def cut_array(
    part: str, array: Float[np.ndarray, "out in"], pieces: int
) -> list[Float[np.ndarray, "_ _"]]:
    """The `part` ("gate_up" or "down") of each piece, in a buffer of its own."""
    found = []
    for piece in np.moveaxis(array.reshape(_cut_shape(part, array.shape, pieces)), 1, 0):
        whole = piece.reshape(-1, array.shape[1]) if part == "gate_up" else piece
        buffer = aligned_buffer(whole.shape, whole.dtype)
        buffer[...] = whole
        found.append(buffer)
    return found


def join_arrays(part: str, pieces: Sequence[Float[np.ndarray, "_ _"]]) -> Float[np.ndarray, "_ _"]:
    """The array that `cut_array` cut into these."""
    if part == "down":
        return np.concatenate(pieces, axis=1)
    halves = [piece.reshape(2, -1, piece.shape[1]) for piece in pieces]
    return np.concatenate(halves, axis=1).reshape(-1, pieces[0].shape[1])


def _cut_shape(part: str, shape: tuple[int, ...], pieces: int) -> tuple[int, ...]:
    rows, columns = shape
    if part == "gate_up":
        return 2, pieces, rows // (2 * pieces), columns
    return rows, pieces, columns // pieces
