import itertools

import numpy as np
import pytest

from moe_jax.training.batches import batches, epoch_rows, leading_whitespace_splits, split_some

VOCAB = {"Ġ": 0, "Ċ": 1, "a": 2, "Ġa": 3, "Ċa": 4, "Ġb": 5}
PAIRS = leading_whitespace_splits(VOCAB)


def take(count, seed=0, **changes):
    documents = [np.arange(10 * n, 10 * n + 9, dtype=np.int32) for n in range(7)]
    pairs = np.full((100, 2), -1, np.int32)
    settings = {"seqs": 2, "length": 6, "pairs": pairs, "part": 0.0, "seed": seed} | changes
    return list(itertools.islice(batches(documents, **settings), count))


def test_only_tokens_whose_rest_is_a_token_are_split():
    assert PAIRS.tolist() == [[-1, -1], [-1, -1], [-1, -1], [0, 2], [1, 2], [-1, -1]]


@pytest.mark.parametrize(("part", "expected"), [(0.0, [3, 2, 5, 4]), (1.0, [0, 2, 2, 5, 1, 2])])
def test_splitting_keeps_the_text(part, expected):
    tokens = np.asarray([3, 2, 5, 4], np.int32)
    made = split_some(tokens, PAIRS, part, np.random.default_rng(0))
    assert made.tolist() == expected


def test_an_epoch_holds_every_document_in_one_piece():
    documents = [np.arange(10 * n, 10 * n + 9, dtype=np.int32) for n in range(7)]
    pairs = np.full((100, 2), -1, np.int32)
    rows = epoch_rows(documents, 5, pairs, 0.0, np.random.default_rng(0))
    assert rows.shape[1] == 5 and 11 <= len(rows) <= 12
    assert len(set(rows.reshape(-1))) == rows.size
    steps = np.diff(rows, axis=1)
    assert set(steps[(rows[:, 1:] % 10) != 0]) == {1}


def test_batches_go_on_after_an_epoch_and_depend_on_the_seed_only():
    many = take(20)
    assert all(batch.shape == (2, 6) and batch.dtype == np.int32 for batch in many)
    np.testing.assert_array_equal(many, take(20))
    assert not np.array_equal(many, take(20, seed=1))


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="the documents hold fewer than 200 tokens; use more text"):
        take(1, length=100)
