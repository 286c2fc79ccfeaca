"""Judges a changed engine by the one it came from: the gate that approximations must pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from moe_jax.engine.engine import Engine
from moe_jax.engine.progress import progress_bar
from moe_jax.evaluate.perplexity import Tokens, log_probabilities
from moe_jax.evaluate.questions import Answers, QuestionSet, answer


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
    texts: Sequence[Tokens],
    questions: Sequence[QuestionSet] = (),
    *,
    bar: Bar | None = None,
    progress: bool = True,
) -> Comparison:
    """Runs both engines over the same texts and questions.

    Args:
      texts: token ids, each read from its start.
      bar: what the change may cost; None: the default `Bar`.

    Raises:
      ValueError: the engines' vocabularies differ, or there is no text.
    """
    sizes = baseline.config.vocab, changed.config.vocab
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the engines have vocabularies of {sizes[0]} and {sizes[1]} tokens; only engines of "
            "one model can be compared"
        )
    if not any(len(text) for text in texts):
        raise ValueError("compare was given no text; give at least one token")
    each, same = [], []
    with progress_bar(len(texts), "compare", "text", progress) as bar_of_texts:
        for text in texts:
            before, after = (log_probabilities(one.logits(text)) for one in (baseline, changed))
            each.append((np.exp(before) * (before - after)).sum(axis=-1))
            same.append(before.argmax(axis=-1) == after.argmax(axis=-1))
            bar_of_texts.update()
    kl = np.concatenate(each)
    return Comparison(
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        agreement=float(np.concatenate(same).mean()),
        tokens=kl.size,
        tasks={one.task: (answer(baseline, one), answer(changed, one)) for one in questions},
        bar=bar or Bar(),
    )
