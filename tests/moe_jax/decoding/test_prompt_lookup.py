import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from moe_jax.decoding.prompt_lookup import accept, draft

TOKENS = st.lists(st.integers(0, 3), max_size=24)


def draft_plainly(tokens, limit, ngram):
    """The definition: try every length, every place, and copy token by token."""
    for n in range(ngram, 0, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == tokens[len(tokens) - n :]:
                text = list(tokens)
                for i in range(limit):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@hypothesis.settings(max_examples=300)
@hypothesis.given(tokens=TOKENS, limit=st.integers(0, 6), ngram=st.integers(1, 5))
def test_draft_follows_the_definition(tokens, limit, ngram):
    expected = draft_plainly(tokens, limit, ngram)
    assert draft(tokens, limit, ngram) == expected
    assert draft(np.array(tokens, np.int32), limit, ngram) == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], []),
        ([5], []),
        ([5, 6, 7], []),
        ([1, 2, 3, 9, 8, 1, 2, 3], [9, 8, 1, 2]),
        ([1, 2, 3, 9, 4, 3, 7, 7, 1, 2, 3], [9, 4, 3, 7]),  # three equal tokens, not the last 3
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2, 3]),  # the later of two
        ([6, 5, 7, 5], [7, 5, 7, 5]),  # repeats itself at the end of the text
        ([5, 5], [5, 5, 5, 5]),
    ],
)
def test_draft_of(tokens, expected):
    drafted = draft(tokens, 4)
    assert drafted == expected
    assert all(type(token) is int for token in drafted)


@hypothesis.given(drafted=TOKENS, more=st.lists(st.integers(0, 3), min_size=24, max_size=24))
def test_accept_counts_the_first_that_agree(drafted, more):
    greedy = [*drafted[: len(drafted) // 2], *more][: len(drafted) + 1]
    count = accept(drafted, np.array(greedy))
    assert drafted[:count] == greedy[:count]
    assert count == len(drafted) or drafted[count] != greedy[count]


def test_drafts_change_no_token():
    """Decoding with drafts gives what decoding token by token gives, in fewer steps."""
    choose = lambda text: (text[-1] * 5 + text[-2] * 3 + 1) % 7
    prompt = [1, 2]
    plain = list(prompt)
    while len(plain) < 100:
        plain.append(choose(plain))
    text, steps = list(prompt), 0
    while len(text) < 100:
        proposed = draft(text, 4)
        greedy = [choose(text + proposed[:i]) for i in range(len(proposed) + 1)]
        text += greedy[: accept(proposed, greedy) + 1]
        steps += 1
    assert text[:100] == plain
    assert steps < 60
