"""Results of an evaluation as a table in Markdown and as JSON."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_jax.evaluate.perplexity import Perplexity
from moe_jax.evaluate.questions import Answers


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      task, group: what was measured; the group "all" is the whole task.
      value: a share of right answers, a perplexity, or nats per token.
      low, high: its 95 % confidence interval; NaN where there is none.
      count: questions, or tokens.
    """

    task: str
    group: str
    value: float
    low: float
    high: float
    count: int

    @property
    def is_share(self) -> bool:
        """Whether more is better and 1 is all."""
        return self.task not in ("perplexity", "drift")


def perplexity_row(result: Perplexity) -> Row:
    """The line of a perplexity."""
    return Row("perplexity", "all", result.value, *result.interval, result.tokens)


def drift_row(value: float, tokens: int) -> Row:
    """The line of how far scores are from recorded ones."""
    return Row("drift", "all", value, math.nan, math.nan, tokens)


def answer_rows(answers: Answers, name: str | None = None) -> list[Row]:
    """A line for a task and, where there are several, one for each group; `name`: another name."""
    task = name or answers.task
    groups = {"all": answers.total}
    if len(answers.groups) > 1:
        groups |= answers.groups
    return [
        Row(task, group, accuracy.share, *accuracy.interval, accuracy.total)
        for group, accuracy in groups.items()
    ]


def as_markdown(rows: Iterable[Row]) -> str:
    """A table."""
    lines = ["| task | | result | 95 % interval | of |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        shown = "{:.1%}".format if row.is_share else "{:.4g}".format
        unit = "questions" if row.is_share else "tokens"
        known = not math.isnan(row.low)
        interval = f"{shown(row.low)} to {shown(row.high)}" if known else "unknown"
        lines.append(
            f"| {row.task} | {row.group} | {shown(row.value)} | {interval} | {row.count} {unit} |"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Row], **about: Any) -> dict[str, Any]:
    """What json.dump takes: what `about` says, and the rows, with null for NaN."""
    known = lambda value: None if isinstance(value, float) and math.isnan(value) else value
    results = [{name: known(value) for name, value in vars(row).items()} for row in rows]
    return {**about, "results": results}
