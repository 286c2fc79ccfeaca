import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul.row_tiles import row_tiles, tile_count

tiles_of = functools.partial(jax.jit, static_argnames=("rows", "size", "aligned"))(row_tiles)


def expected_tiles(sizes, rows, size, aligned):
    """Walks over the rows one by one; a tile ends where it is full, at a group and at a block."""
    group_of = np.repeat(np.arange(len(sizes) + 1), [*sizes, rows - sum(sizes)])
    tiles = []
    for row, group in enumerate(group_of):
        new_tile = (
            not tiles
            or tiles[-1][0] != group
            or row - tiles[-1][1] == size
            or (aligned and row % size == 0)
        )
        if new_tile:
            tiles.append([int(group), row, row])
        tiles[-1][2] = row + 1
    return tiles


def check(sizes, rows, size, aligned):
    result = tiles_of(jnp.array(sizes, jnp.int32), rows=rows, size=size, aligned=aligned)
    assert {array.dtype for array in result} == {jnp.dtype("int32")}
    tiles = np.stack(result, axis=1).tolist()
    expected = expected_tiles(sizes, rows, size, aligned)
    assert len(tiles) == tile_count(rows, len(sizes), size, aligned=aligned)
    assert len(expected) <= len(tiles)
    unused = [expected[-1][0], rows, rows]
    assert tiles == expected + (len(tiles) - len(expected)) * [unused]


@pytest.mark.parametrize("aligned", [False, True])
@settings(max_examples=60)
@given(
    cuts=st.lists(st.integers(0, 60), min_size=6, max_size=6), size=st.sampled_from([1, 4, 8, 64])
)
def test_every_row_lies_in_one_tile_of_its_group(aligned, cuts, size):
    check(np.diff([0, *sorted(cuts)]).tolist(), 60, size, aligned)


@pytest.mark.parametrize(
    "aligned, ends", [(False, [4, 5, 7, 10, 12]), (True, [4, 5, 7, 8, 10, 12])]
)
def test_the_drawing(aligned, ends):
    check((5, 2, 3, 0), 12, 4, aligned)
    tiles = row_tiles(jnp.array([5, 2, 3, 0]), 12, 4, aligned=aligned)
    assert tiles.end.tolist()[: len(ends)] == ends


@pytest.mark.parametrize(
    "rows, groups, size, aligned, count",
    [
        (8, 128, 16, False, 8),  # never more tiles than rows
        (8, 128, 16, True, 8),
        (4096, 8, 128, False, 40),
        (4096, 8, 128, True, 40),
        (1, 1, 64, False, 1),
    ],
)
def test_enough_tiles_and_not_many_more(rows, groups, size, aligned, count):
    assert tile_count(rows, groups, size, aligned=aligned) == count


@pytest.mark.parametrize("aligned", [False, True])
def test_sizes_that_do_not_fit_stay_within_the_rows(aligned):
    tiles = row_tiles(jnp.array([5, 9, 3]), 8, 4, aligned=aligned)
    used = tiles.first < tiles.end
    assert tiles.group[used].tolist() == [0, 0, 1]
    assert tiles.end.tolist() == [4, 5, 8, 8, 8][: tiles.end.size]
