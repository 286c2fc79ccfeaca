import numpy as np
import pytest

from moe_jax.engine.load import reference_model_folder
from moe_jax.evaluate.data import Question
from moe_jax.evaluate.glued import answer_glued, visible
from moe_jax.evaluate.questions import QuestionSet, answer, make_questions
from moe_jax.training.restore import restore


@pytest.fixture(scope="module")
def model():
    return restore(reference_model_folder())


def test_a_chunk_sees_itself_and_the_question_sees_all():
    question = Question((1,) * 6, (2,), chunks=(0, 3), end=5)
    seen = visible(question, 7, glued=True).astype(int)
    assert seen.tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert (visible(question, 7, glued=False) == np.tri(7, dtype=bool)).all()


def test_unglued_it_is_the_model(engine, text, model):
    cross = make_questions("cross_chunk", engine, text, 2)
    told = engine.generate([list(one.prompt) for one in cross.questions], max_tokens=2)
    # What the engine says is right, whatever the model has learnt; and one token of it wrong.
    said = [Question(q.prompt, tuple(t.tokens), q.chunks, q.end) for q, t in zip(
        cross.questions, told, strict=True)]  # fmt: skip
    wrong = [Question(q.prompt, (q.answer[0], q.answer[1] ^ 1), q.chunks, q.end) for q in said]
    questions = QuestionSet("cross_chunk", {"said": said, "wrong": wrong})
    answers = answer_glued(*model, questions, glued=False)
    assert answers.right == answer(engine, questions).right == (True,) * 10 + (False,) * 10


def test_glued_another_chunk_is_not_seen(engine, text, model):
    first, asked, seen_asked, alone, seen = tuple(text[:60].tolist()), [], [], [], []
    # The second chunk repeats the first up to some place: who sees both knows how it goes on.
    for stop in range(20, 50, 3):
        second = first[:stop]
        alone.append(tuple(engine.generate(list(second), max_tokens=1).tokens))
        seen.append(tuple(engine.generate([*first, *second], max_tokens=1).tokens))
        # The question, which would see all, is the answer.
        place = {"chunks": (0, len(first)), "end": len(first) + stop}
        asked.append(Question(first + second, alone[-1], **place))
        seen_asked.append(Question(first + second, seen[-1], **place))
    assert alone != seen
    assert all(answer_glued(*model, QuestionSet("", {"": asked})).right)
    assert all(answer_glued(*model, QuestionSet("", {"": seen_asked}), glued=False).right)
