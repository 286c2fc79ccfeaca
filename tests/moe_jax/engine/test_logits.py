"""Logits of one sequence and of a batch."""

from unittest import mock

import numpy as np
import pytest

from tests.tolerances import assert_close

TOKENS = np.random.default_rng(5).integers(1, 300, (2, 40))


def test_shapes_and_dtype(engine):
    one, batch = engine.logits(TOKENS[0]), engine.logits(TOKENS)
    assert one.shape == (40, 300)
    assert batch.shape == (2, 40, 300)
    assert one.dtype == batch.dtype == np.float32
    np.testing.assert_array_equal(batch[0], one)
    np.testing.assert_array_equal(batch[1], engine.logits(TOKENS[1].tolist()))


def test_later_tokens_do_not_change_earlier_logits(engine):
    whole = engine.logits(TOKENS[0])
    np.testing.assert_allclose(engine.logits(TOKENS[0, :33]), whole[:33], atol=1e-5)


@pytest.mark.parametrize("prompt_tokens", [0, 1, 33, 39, 40])
def test_tokens_may_be_read_one_by_one_from_any_place_on(engine, prompt_tokens):
    whole = engine.logits(TOKENS)
    runner = engine._loop.runner
    with mock.patch.object(runner, "step", wraps=runner.step) as step:
        parts = engine.logits(TOKENS, prompt_tokens=prompt_tokens)
    assert step.call_count == 2 * (40 - prompt_tokens)
    assert_close(parts, whole)


@pytest.mark.parametrize("prompt_tokens", [-1, 41])
def test_a_prompt_longer_than_the_text_is_refused(engine, prompt_tokens):
    with pytest.raises(ValueError, match="between 0 and the 40 tokens of the text, got"):
        engine.logits(TOKENS, prompt_tokens=prompt_tokens)


@pytest.mark.parametrize(
    "tokens, text",
    [
        ([0.5, 1.0], r"integer token ids of shape \[seq\] or \[batch, seq\], got float64 of shape"),
        (np.zeros((1, 2, 3), int), r"got int64 of shape \(1, 2, 3\)"),
        (7, r"got int64 of shape \(\)"),
        ([True, False], "got bool of shape"),
        ("text", "got <U4 of shape"),
        (np.zeros((0, 4), int), "logits was given no tokens; give at least one row"),
        (np.zeros(0, int), "logits was given no tokens"),
        (np.zeros((1, 0), int), "the prompt is empty"),
        ([1, 300], r"token id 300 is outside the vocabulary of 300 tokens \(0..299\)"),
        ([[1, -1]], "token id -1 is outside the vocabulary"),
        ([1] * 65, "the prompt has 65 tokens, longer than max_tokens=64"),
    ],
)
def test_what_cannot_be_computed_is_refused(engine, tokens, text):
    with pytest.raises(ValueError, match=text):
        engine.logits(tokens)
