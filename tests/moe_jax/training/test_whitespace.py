import numpy as np
import pytest

from moe_jax.training.whitespace import leading_whitespace_splits, split_some

VOCAB = {"Ġ": 0, "Ċ": 1, "a": 2, "Ġa": 3, "Ċa": 4, "Ġb": 5}
PAIRS = leading_whitespace_splits(VOCAB)


def test_only_tokens_whose_rest_is_a_token_are_split():
    assert PAIRS.tolist() == [[-1, -1], [-1, -1], [-1, -1], [0, 2], [1, 2], [-1, -1]]


@pytest.mark.parametrize(("part", "expected"), [(0.0, [3, 2, 5, 4]), (1.0, [0, 2, 2, 5, 1, 2])])
def test_splitting_keeps_the_text(part, expected):
    tokens = np.asarray([3, 2, 5, 4], np.int32)
    made = split_some(tokens, PAIRS, part, np.random.default_rng(0))
    assert made.tolist() == expected
