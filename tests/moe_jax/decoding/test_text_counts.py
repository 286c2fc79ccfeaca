import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np

from moe_jax.decoding.text_counts import (
    count_tokens,
    empty_text_counts,
    pad_tokens,
    set_row,
)

VOCAB = 6
ROWS = 3
TEXT = st.lists(st.integers(0, VOCAB - 1), max_size=9)


@hypothesis.given(
    texts=st.lists(st.tuples(st.integers(0, ROWS - 1), TEXT, TEXT), max_size=5),
    steps=st.lists(
        st.tuples(
            st.permutations(range(ROWS + 1)).map(lambda rows: rows[:2]),
            st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=2),
        ),
        max_size=4,
    ),
)
def test_counts_are_those_of_the_texts(texts, steps):
    """Rows are set again and again, and grow; row ROWS is padding."""
    counts = empty_text_counts(ROWS, VOCAB)
    expected: list[tuple[list[int], list[int]]] = [([], []) for _ in range(ROWS)]
    for row, prompt, generated in texts:
        counts = set_row(counts, row, pad_tokens(prompt, VOCAB), pad_tokens(generated, VOCAB))
        expected[row] = (prompt, list(generated))
    for rows, tokens in steps:
        counts = count_tokens(counts, jnp.array(rows), jnp.array(tokens, jnp.int32))
        for row, token in zip(rows, tokens, strict=True):
            if row < ROWS:
                expected[row][1].append(token)
    for row, (prompt, generated) in enumerate(expected):
        np.testing.assert_array_equal(counts.in_prompt[row], np.isin(range(VOCAB), prompt))
        np.testing.assert_array_equal(
            counts.generated[row], np.bincount(np.array(generated, int), minlength=VOCAB)
        )


def test_lengths_are_few():
    lengths = {len(pad_tokens([1] * count, VOCAB)) for count in range(5000)}
    assert lengths == {64, 512, 4096, 32768}
    np.testing.assert_array_equal(pad_tokens([3, 0], VOCAB), [3, 0] + [VOCAB] * 62)


def test_setting_a_row_copies_no_other():
    counts = empty_text_counts(ROWS, VOCAB)
    tokens = pad_tokens([1], VOCAB)
    text = set_row.lower(counts, 0, tokens, tokens).compile().as_text()
    assert "input_output_alias" in text.splitlines()[0]
    set_row(counts, 0, tokens, tokens)
    assert counts.generated.is_deleted()
    assert counts.in_prompt.is_deleted()
