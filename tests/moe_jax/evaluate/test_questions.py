import numpy as np
import pytest

import moe_jax
from moe_jax.evaluate.accuracy import Accuracy
from moe_jax.evaluate.questions import (
    CROSS_CHUNKS,
    PASSKEY_DEPTHS,
    PASSKEY_LENGTHS,
    TASKS,
    QuestionSet,
    answer,
    grade,
    make_questions,
    text_start,
)


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_the_same_for_a_seed_and_start_as_texts_start(engine, text, task):
    made = make_questions(task, engine, text, 2)
    assert made == make_questions(task, engine, text, 2)
    assert made.questions != make_questions(task, engine, text, 2, seed=1).questions
    assert all(len(group) == 2 for group in made.groups.values())
    assert all(question.prompt[0] == 0 for question in made.questions)


def test_pass_keys_lie_at_every_depth_of_every_length(engine, text):
    made = make_questions("passkey", engine, text, 1)
    assert len(made.groups) == len(PASSKEY_LENGTHS) * len(PASSKEY_DEPTHS)
    for name, (question,) in made.groups.items():
        length, depth = int(name.split()[0]), int(name.split()[-1].rstrip("%")) / 100
        assert 0.98 * length < len(question.prompt) + len(question.answer) <= length + 1
        key, prompt = question.answer, question.prompt
        places = [i for i in range(len(prompt)) if prompt[i : i + len(key)] == key]
        assert len(places) == 1
        assert places[0] / len(prompt) == pytest.approx(depth, abs=0.03)


def test_every_chunk_of_a_question_holds_a_team(engine, text):
    made = make_questions("cross_chunk", engine, text, 2)
    for chunks, group in zip(CROSS_CHUNKS, made.groups.values(), strict=True):
        for question in group:
            assert len(question.chunks) == chunks
            parts = np.split(question.prompt[: question.end], question.chunks[1:])
            assert all("# Team" in engine.tokenizer.decode(part.tolist()) for part in parts)


def test_an_answer_is_right_only_as_a_whole(engine, text):
    questions = make_questions("copying", engine, text, 2)
    told = engine.generate([list(q.prompt) for q in questions.questions], max_tokens=3)
    first, second = questions.questions
    said = tuple(told[0].tokens)
    wrong = (*told[1].tokens[:2], told[1].tokens[2] ^ 1)
    ((name, _),) = questions.groups.items()
    changed = [type(first)(first.prompt, said), type(second)(second.prompt, wrong)]
    answers = answer(engine, type(questions)("copying", {name: changed}))
    assert answers.right == (True, False)
    assert answers.total == Accuracy(1, 2) and answers.groups == {name: Accuracy(1, 2)}


def test_groups_are_graded_in_order(engine, text):
    questions = make_questions("cross_chunk", engine, text, 1)
    answers = grade(questions, [True, False, False, True, True])
    assert [one.right for one in answers.groups.values()] == [1, 0, 0, 1, 1]


def test_what_cannot_be_asked_is_refused(engine, text, copy_without_tokenizer):
    with pytest.raises(ValueError, match="no task 'sums'; there are passkey, recall"):
        make_questions("sums", engine, text, 1)
    with pytest.raises(ValueError, match="each=0 questions in a group; ask at least one"):
        make_questions("recall", engine, text, 0)
    with pytest.raises(ValueError, match="100 tokens of text are too few"):
        make_questions("recall", engine, text[:100], 1)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        text_start(copy_without_tokenizer)


def test_a_question_that_does_not_fit_is_refused_and_not_counted_as_wrong(engine, text):
    small = moe_jax.load(max_tokens=64, max_seqs=1, progress=False)
    copying = make_questions("copying", engine, text, 1)
    (question,) = copying.questions
    longest = len(question.prompt) + len(question.answer) - 1
    with pytest.raises(ValueError, match=f"takes {longest} tokens .* load the model with max_tok"):
        answer(small, copying)
    with pytest.raises(ValueError, match="no question of the task 'copying'"):
        answer(engine, QuestionSet("copying", {"": []}))


@pytest.fixture
def copy_without_tokenizer(damaged) -> moe_jax.Engine:
    folder = damaged()
    (folder / "tokenizer.json").unlink()
    return moe_jax.load(folder, max_tokens=64, progress=False)
