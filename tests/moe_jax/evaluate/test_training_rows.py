import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer

from moe_jax.engine.load import reference_model_folder
from moe_jax.evaluate.data import is_for_tests
from moe_jax.evaluate.training_rows import ANSWER, MIXES, TrainingText, step_rows
from moe_jax.training.whitespace import leading_whitespace_splits

TOKENIZER = Tokenizer.from_file(str(reference_model_folder() / "tokenizer.json"))
END, VOCAB = 0, TOKENIZER.get_vocab_size()
ALL = MIXES["all"]


@pytest.fixture
def text():
    tokens = np.random.default_rng(0).integers(260, VOCAB, 20_000).astype(np.int32)
    splits = leading_whitespace_splits(TOKENIZER.get_vocab())
    return TrainingText(tokens, lambda text: TOKENIZER.encode(text).ids, END, splits, 0.02)


def only(kind, mix=ALL):
    return dataclasses.replace(mix, kinds={one: float(one == kind) for one in mix.kinds})


def test_a_step_depends_on_seed_and_number_alone(text):
    first = step_rows(text, 4096, 0, 7, ALL)
    for one, again in zip(first, step_rows(text, 4096, 0, 7, ALL), strict=True):
        np.testing.assert_array_equal(one, again)
    assert not np.array_equal(first[0], step_rows(text, 4096, 1, 7, ALL)[0])


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("kind", ALL.kinds)
def test_rows_are_full_and_answers_weigh_most(text, kind, name):
    for step in range(4):
        rows, importance = step_rows(text, 4096, 0, step, only(kind, MIXES[name]))
        seqs, length = rows.shape
        assert seqs * (length - 1) == 4096 and importance.shape == (seqs, length - 1)
        assert rows.min() >= 0 and rows.max() < VOCAB
        answers = rows[:, 1:][importance == ANSWER]
        assert bool(answers.size) == (kind != "text")
        others = set(np.unique(importance)) - {ANSWER}
        assert others <= ({0.0, 1.0} if kind == "passkey" else {float(kind == "text")})


@pytest.mark.parametrize("kind", ["passkey", "recall", "cross_chunk", "copying"])
def test_no_answer_is_for_tests(text, kind):
    rows, importance = step_rows(text, 4096, 0, 0, only(kind))
    (space,) = TOKENIZER.encode("\n").ids
    said = TOKENIZER.decode(np.where(importance == ANSWER, rows[:, 1:], space).ravel().tolist())
    words = [word for word in said.split() if len(word) >= 6 or kind != "copying"]
    whole = [word for word in words if len(word) >= (5 if kind == "passkey" else 4)]
    assert whole and not any(is_for_tests(word) for word in whole)


@pytest.mark.parametrize("from_start", [0.0, 1.0])
def test_a_key_may_stand_at_the_very_start_and_be_asked_at_the_end(text, from_start):
    mix = dataclasses.replace(only("passkey"), from_start=from_start)
    for step in range(8):
        rows, importance = step_rows(text, 4096, 0, step, mix)
        at_start = [TOKENIZER.decode(row[:20]).startswith("\n# The pass key of") for row in rows]
        assert at_start == [bool(from_start)] * len(rows)
        if from_start:
            assert all(weights[weights > 0][-1] == ANSWER for weights in importance)


def test_other_keys_may_stand_near_the_start_and_be_asked_at_the_end(text):
    mix = dataclasses.replace(only("passkey"), lengths={4096: 1.0}, from_start=1.0, near_start=1.0)
    several = 0
    for step in range(4):
        (row,), (importance,) = step_rows(text, 4096, 0, step, mix)
        asked = np.flatnonzero(
            np.diff(importance == ANSWER, prepend=False) & (importance == ANSWER)
        )
        assert (asked > 3000).all()
        begin = TOKENIZER.decode(row[:1000])
        assert begin.count("\n# The pass key of") == len(asked)
        several += len(asked) > 1
    assert several


def test_keys_may_be_many_and_asked_at_once(text):
    mix = dataclasses.replace(only("passkey"), lengths={4096: 1.0}, at_once=1.0, keys=4)
    (row,), (importance,) = step_rows(text, 4096, 0, 0, mix)
    given, asked = TOKENIZER.decode(row).split("\n# The pass key of")[1:][::2], importance == ANSWER
    assert len(given) >= 4 and len(given) % 4 == 0
    assert np.diff(asked.astype(int)).clip(0).sum() == len(given)
    # What stands between a key and its question is nothing.
    assert all(part.endswith(".\n") for part in given)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_parts_sum_to_one(mix):
    assert sum(mix.lengths.values()) == pytest.approx(1) == sum(mix.kinds.values())
