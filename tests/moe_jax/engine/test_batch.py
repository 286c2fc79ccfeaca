"""The new tokens of several sequences, end to end, in one of a few shapes."""

import numpy as np
import pytest

from moe_jax.engine.batch import NewTokens, decode_shape, last_tokens, pack_step, padded

PAGES = np.array([[3, 9], [4, 5]], np.int32)


def test_packing_lays_sequences_end_to_end():
    batch = [NewTokens([7, 8], 4, 6, PAGES[0]), NewTokens([9], 0, 1, PAGES[1])]
    step = pack_step(batch, tokens=5, seqs=4)
    assert step.tokens.tolist() == [7, 8, 9, 0, 0]
    assert step.query_starts.tolist() == [0, 2, 3, 3, 3]
    assert step.kv_lengths.tolist() == [6, 1, 0, 0]
    assert step.rope_lengths.tolist() == [6, 1, 1, 1]
    assert step.block_tables.tolist() == [[3, 9], [4, 5], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ([], []),
        ([2], [([9], 6)]),
        ([3], [([5], 1)]),
        ([1, 2, 3], [([8, 9], 5), ([5], 1)]),
        ([0, 1, 2, 3], [([7, 8, 9], 4), ([5], 1)]),
    ],
)
def test_the_last_tokens_follow_those_before_them(wanted, expected):
    batch = [NewTokens([7, 8, 9], 4, 9, PAGES[0]), NewTokens([5], 1, 3, PAGES[1])]
    found = last_tokens(batch, wanted)
    assert [(new.tokens, new.cached) for new in found] == expected
    lengths = {4: 9, 5: 9, 6: 9, 1: 3}
    assert [new.length for new in found] == [lengths[new.cached] for new in found]


@pytest.mark.parametrize("wanted", [[0], [0, 2], [3, 2]])
def test_only_the_last_tokens_of_a_sequence_can_be_wanted(wanted):
    batch = [NewTokens([7, 8, 9], 4, 9, PAGES[0]), NewTokens([5], 1, 3, PAGES[1])]
    with pytest.raises(AssertionError):
        last_tokens(batch, wanted)


@pytest.mark.parametrize(
    "counts, shape",
    [([1], (1, 1, 1)), ([1] * 3, (4, 4, 1)), ([1, 2], (16, 2, 8)), ([8] * 5, (64, 8, 8))],
)
def test_shapes_of_decode_are_powers_of_two(counts, shape):
    batch = [NewTokens([1] * count, 0, 64, PAGES[0]) for count in counts]
    assert decode_shape(batch) == shape


def test_places_are_filled_up_with_the_first():
    assert padded([5, 7], 4).tolist() == [5, 7, 0, 0]
