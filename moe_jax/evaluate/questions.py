"""The fixed sets of questions that models are judged by, and how an engine answers them.

The same seed gives the same questions on every machine whose Python library is the same.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.engine.engine import Engine
from moe_jax.evaluate.accuracy import Accuracy
from moe_jax.evaluate.data import (
    Piece,
    Question,
    as_question,
    copying,
    cross_chunk,
    fillers,
    passkey,
    recall,
)
from moe_jax.evaluate.perplexity import Tokens

TASKS = ("passkey", "recall", "cross_chunk", "copying")
PASSKEY_LENGTHS = (1024, 2048, 4096)
PASSKEY_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECALL_PAIRS = 32
CROSS_CHUNKS = (2, 3, 4, 5, 6)
# Names in each chunk, and tokens of other text before them.
CROSS_MEMBERS, CROSS_FILLER = 4, 48
COPIED_NAMES = 16


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one task.

    Attributes:
      groups: what they have in common, e.g. "1024 tokens, depth 50 %", and the questions.
    """

    task: str
    groups: Mapping[str, Sequence[Question]]

    @property
    def questions(self) -> list[Question]:
        """All of them, group by group."""
        return [question for group in self.groups.values() for question in group]


@dataclass(frozen=True)
class Answers:
    """How an engine, or another way of answering, did.

    Attributes:
      groups: the accuracy of each group of questions.
      right: whether each question was answered, in the order of the set.
    """

    task: str
    groups: Mapping[str, Accuracy]
    right: tuple[bool, ...]

    @property
    def total(self) -> Accuracy:
        """Over all groups."""
        return sum(self.groups.values(), Accuracy(0, 0))


def make_questions(
    task: str, engine: Engine, text: Tokens, each: int, seed: int = 0
) -> QuestionSet:
    """Draws the test questions of a task.

    Args:
      task: one of TASKS.
      engine: what encodes text, not what is asked.
      text: tokens of text that the model was not trained on, to hide things in; at least 5,000.
      each: questions in each group, at least one.

    Raises:
      ValueError: the task is not known, the text is too short, or the model has no tokenizer or one
        that joins questions and answers.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    if each < 1:
        raise ValueError(f"each={each} questions in a group; ask at least one")
    longest = max(PASSKEY_LENGTHS)
    if len(text) < longest + 500:
        raise ValueError(f"{len(text)} tokens of text are too few to hide keys in; give 5,000")
    generator = np.random.default_rng([seed, TASKS.index(task)])
    start = text_start(engine)
    assert engine.tokenizer is not None, "text_start would have refused it"
    encode = engine.tokenizer.encode_chat
    more = fillers(np.asarray(text), longest, generator)
    makers: dict[str, Callable[[], list[Piece]]] = {}
    if task == "passkey":
        for length, depth in itertools.product(PASSKEY_LENGTHS, PASSKEY_DEPTHS):
            # What hides the key and asks for it takes about 40 tokens.
            makers[f"{length} tokens, depth {depth:.0%}"] = lambda length=length, depth=depth: (
                passkey(encode, next(more)[: length - 40], [depth], [1.0], "test", generator)
            )
    elif task == "recall":
        name = f"{RECALL_PAIRS} pairs"
        makers[name] = lambda: recall(encode, RECALL_PAIRS, 1, "test", generator)
    elif task == "cross_chunk":
        for chunks in CROSS_CHUNKS:
            makers[f"{chunks} chunks"] = lambda chunks=chunks: cross_chunk(
                encode,
                chunks,
                CROSS_MEMBERS,
                [next(more)[:CROSS_FILLER] for _ in range(chunks)],
                "test",
                generator,
            )
    else:
        name = f"{COPIED_NAMES} names"
        makers[name] = lambda: copying(encode, COPIED_NAMES, "test", generator)
    # In questions across chunks, all pieces but the question and the answer are chunks.
    groups = {}
    for name, make in makers.items():
        drawn = [make() for _ in range(each)]
        groups[name] = [
            as_question(one, start, len(one) - 2 if task == "cross_chunk" else 0) for one in drawn
        ]
    return QuestionSet(task, groups)


def text_start(engine: Engine) -> tuple[int, ...]:
    """What a model's texts start with: what its tokenizer puts there, or else an end of text.

    Raises:
      ValueError: the model has no tokenizer, or neither of the two.
    """
    if engine.tokenizer is None:
        raise ValueError("the tasks are text, and this model has no tokenizer.json; add one")
    start = tuple(engine.tokenizer.encode("")) or tuple(sorted(engine.stop_tokens)[:1])
    if not start:
        raise ValueError(
            "neither the tokenizer starts texts nor does the checkpoint name an end of text; set "
            "eos_token_id in its generation_config.json"
        )
    return start


def answer(engine: Engine, questions: QuestionSet) -> Answers:
    """Lets an engine continue every prompt greedily; right is what equals the answer throughout.

    Answers of one length run together.

    Raises:
      ValueError: there is no question, or one does not fit into the engine's KV cache.
    """
    check_room(engine, questions)
    every = questions.questions
    right = [False] * len(every)
    for length in sorted({len(question.answer) for question in every}):
        places = [i for i, question in enumerate(every) if len(question.answer) == length]
        prompts = [list(every[i].prompt) for i in places]
        completions = engine.generate(prompts, max_tokens=length, ignore_eos=True)
        for i, completion in zip(places, completions, strict=True):
            right[i] = tuple(completion.tokens) == every[i].answer
    return grade(questions, right)


def check_room(engine: Engine, questions: QuestionSet) -> None:
    """Raises ValueError unless an engine can hold every question with its answer."""
    if not questions.questions:
        raise ValueError(f"there is no question of the task {questions.task!r}; give at least one")
    # The last token of an answer is never stored.
    longest = max(len(one.prompt) + len(one.answer) - 1 for one in questions.questions)
    if longest > engine.max_tokens:
        raise ValueError(
            f"a question of the task {questions.task!r} takes {longest} tokens with its answer, "
            f"and the engine has max_tokens={engine.max_tokens}; load the model with "
            f"max_tokens={longest}"
        )


def grade(questions: QuestionSet, right: Sequence[bool]) -> Answers:
    """Sorts into groups which questions were answered."""
    groups, place = {}, 0
    for name, group in questions.groups.items():
        groups[name] = Accuracy(sum(right[place : place + len(group)]), len(group))
        place += len(group)
    return Answers(questions.task, groups, tuple(right))
