import numpy as np
import pytest

from moe_jax.evaluate import training_rows
from moe_jax.evaluate.data import is_for_tests
from moe_jax.evaluate.training_rows import ANSWER, KINDS, TrainingText, step_rows
from moe_jax.training.whitespace import leading_whitespace_splits

END, VOCAB = 256, 300


@pytest.fixture
def text():
    tokens = np.random.default_rng(0).integers(260, VOCAB, 20_000).astype(np.int32)
    splits = leading_whitespace_splits({str(token): token for token in range(VOCAB)})
    return TrainingText(tokens, lambda text: list(text.encode()), END, splits, 0.02)


@pytest.fixture
def only(monkeypatch):
    def only(kind):
        monkeypatch.setattr(training_rows, "KINDS", {one: float(one == kind) for one in KINDS})

    return only


def test_a_step_depends_on_seed_and_number_alone(text):
    first = step_rows(text, 4096, 0, 7)
    for one, again in zip(first, step_rows(text, 4096, 0, 7), strict=True):
        np.testing.assert_array_equal(one, again)
    assert not np.array_equal(first[0], step_rows(text, 4096, 1, 7)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_full_and_answers_weigh_most(text, only, kind):
    only(kind)
    for step in range(4):
        rows, importance = step_rows(text, 4096, 0, step)
        seqs, length = rows.shape
        assert seqs * (length - 1) == 4096 and importance.shape == (seqs, length - 1)
        assert rows.min() >= 0 and rows.max() < VOCAB
        answers = rows[:, 1:][importance == ANSWER]
        assert bool(answers.size) == (kind != "text")
        others = set(np.unique(importance)) - {ANSWER}
        assert others <= ({0.0, 1.0} if kind == "passkey" else {float(kind == "text")})


@pytest.mark.parametrize("kind", ["passkey", "recall", "cross_chunk", "copying"])
def test_no_answer_is_for_tests(text, only, kind):
    only(kind)
    rows, importance = step_rows(text, 4096, 0, 0)
    said = bytes(np.where(importance == ANSWER, rows[:, 1:], ord(" ")).astype(np.uint8).ravel())
    words = [word for word in said.decode().split() if len(word) >= 6 or kind != "copying"]
    whole = [word for word in words if len(word) >= (5 if kind == "passkey" else 4)]
    assert whole and not any(is_for_tests(word) for word in whole)
