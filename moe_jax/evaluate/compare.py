"""Judges a changed engine by the one it came from: the gate that approximations must pass."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from moe_jax.engine.engine import Engine
from moe_jax.engine.progress import progress_bar
from moe_jax.evaluate.held_out import held_out_texts
from moe_jax.evaluate.perplexity import Tokens, check_texts, log_probabilities, windows
from moe_jax.evaluate.questions import (
    CROSS_CHUNKS,
    Answers,
    QuestionSet,
    answer,
    check_room,
    make_questions,
)

_ROWS = 256


@dataclass(frozen=True)
class Bar:
    """What a change may cost at most.

    The defaults let bfloat16 in the place of float32 pass, and experts in 8 bits, with the embedded
    model; they catch a rotary base that is off by a tenth.

    Attributes:
      kl: nats per token by which the changed distribution may be away from the other.
      agreement: the least part of tokens for which both find the same one likeliest.
      points: percentage points that each task may lose.
    """

    kl: float = 0.001
    agreement: float = 0.98
    points: float = 2.0


@dataclass(frozen=True)
class Comparison:
    """What a change does to a model; print it.

    Attributes:
      kl: the mean over tokens of KL(baseline || changed), in nats.
      worst_kl: of the token where it is largest.
      agreement: the part of tokens for which both find the same one likeliest.
      tokens: how many were compared.
      tasks: of each task, the answers of both.
      bar: what it was held against.
    """

    kl: float
    worst_kl: float
    agreement: float
    tokens: int
    tasks: Mapping[str, tuple[Answers, Answers]]
    bar: Bar = field(default_factory=Bar)

    def points(self, task: str) -> float:
        """Percentage points by which the change is better at a task; negative: worse."""
        before, after = self.tasks[task]
        return 100 * (after.total.share - before.total.share)

    @property
    def failures(self) -> list[str]:
        """What is worse than the bar allows; empty if it holds."""
        bar, found = self.bar, []
        # Written so that NaN fails.
        if not self.kl <= bar.kl:
            found.append(f"KL {self.kl:.3g} nats per token, at most {bar.kl:g} allowed")
        if not self.agreement >= bar.agreement:
            found.append(
                f"the same likeliest token for {self.agreement:.1%}, at least {bar.agreement:.1%} "
                "asked"
            )
        for task in self.tasks:
            if not (points := self.points(task)) >= -bar.points:
                found.append(f"{task} {points:+.1f} points, at most {bar.points:g} may be lost")
        return found

    @property
    def holds(self) -> bool:
        """Whether the change passes."""
        return not self.failures

    def __str__(self) -> str:
        lines = [
            f"{self.tokens} tokens: KL {self.kl:.3g} nats per token (worst {self.worst_kl:.3g}), "
            f"the same likeliest token for {self.agreement:.2%}"
        ]
        for task, (before, after) in self.tasks.items():
            shares = f"{before.total.share:.1%} -> {after.total.share:.1%}"
            lines.append(f"{task}: {shares} ({self.points(task):+.1f} points)")
        lines += [f"FAILS: {failure}" for failure in self.failures] or ["the bar holds"]
        return "\n".join(lines)


def compare(
    baseline: Engine,
    changed: Engine,
    texts: Sequence[Tokens] | None = None,
    questions: Sequence[QuestionSet] | None = None,
    *,
    context: int = 1024,
    decoded: int = 16,
    bar: Bar | None = None,
    progress: bool = True,
) -> Comparison:
    """Runs both engines over the same texts and questions.

    Args:
      texts: token ids, read in windows of `context` tokens that overlap by half; None: the first
        512 tokens of some modules of Python's library.
      questions: none of them the same task; None: 100 each of recall and cross_chunk; (): none.
      context: tokens in a window, at least 2.
      decoded: so many tokens at the end of each window are read one by one, as in decoding.
      bar: what the change may cost; None: the default `Bar`.

    Raises:
      ValueError: the engines' vocabularies differ, there is no text, or it is none; context is too
        short or long; a task is asked twice, or does not fit into one of the engines; texts or
        questions are to be made, and the model has no tokenizer.
    """
    engines = baseline, changed
    sizes = [engine.config.vocab for engine in engines]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the engines have vocabularies of {sizes[0]} and {sizes[1]} tokens; only engines of "
            "one model can be compared"
        )
    if texts is None or questions is None:
        own = held_out_texts(baseline)
        texts = [text[:512] for text in own] if texts is None else texts
        questions = (
            _own_questions(baseline, np.concatenate(own)) if questions is None else questions
        )
    check_texts(texts)
    tasks = [one.task for one in questions]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"a task is asked twice in {tasks}; put its groups into one QuestionSet")
    for engine, one in itertools.product(engines, questions):
        check_room(engine, one)
    kl, same = _differences(engines, texts, context, decoded, progress)
    return Comparison(
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        agreement=float(same.mean()),
        tokens=kl.size,
        tasks={one.task: (answer(baseline, one), answer(changed, one)) for one in questions},
        bar=bar or Bar(),
    )


def _own_questions(engine: Engine, text: Tokens) -> list[QuestionSet]:
    each = {"recall": 100, "cross_chunk": 100 // len(CROSS_CHUNKS)}
    return [make_questions(task, engine, text, count) for task, count in each.items()]


def _differences(
    engines: tuple[Engine, Engine],
    texts: Sequence[Tokens],
    context: int,
    decoded: int,
    progress: bool,
) -> tuple[Float[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """KL divergence, and whether the likeliest token is the same, for every scored token."""
    if context < 2 or decoded < 0:
        raise ValueError(
            f"context={context}, decoded={decoded}: give at least 2, and no less than 0"
        )
    spans = [span for text in texts for span in windows(text, context, max(1, context // 2))]
    kl, same = [], []
    with progress_bar(len(spans), "compare", "window", progress) as bar:
        for tokens, new in spans:
            read = max(0, len(tokens) - decoded)
            logits = [engine.logits(tokens, prompt_tokens=read)[-new:] for engine in engines]
            # Few rows at a time: of a large vocabulary a window's would take gigabytes.
            for first in range(0, new, _ROWS):
                rows = slice(first, first + _ROWS)
                before, after = (log_probabilities(one[rows]) for one in logits)
                kl.append((np.exp(before) * (before - after)).sum(axis=-1))
                same.append(before.argmax(axis=-1) == after.argmax(axis=-1))
            bar.update()
    return np.concatenate(kl), np.concatenate(same)
