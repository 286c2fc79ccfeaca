"""What every way is measured at: prompts and beam searches, one line of numbers for each.

Knows tokens and clocks; neither engines nor checkpoints.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROMPT = 16  # tokens of a prompt that is then decoded
WARM_UP_TOKENS = 2
# A line whose counted runs have taken so long is not run again: its median would gain little.
LONG_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing to measure.

    Attributes:
      prompt: tokens of the prompt.
      decode: tokens that are decoded after it; 0: the prefill is what is measured.
      beams: width of the beam search; 1: greedy.
    """

    name: str
    prompt: int
    decode: int = 0
    beams: int = 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every way does with the same tokens.

    Attributes:
      folder: the checkpoint.
      vocab: token ids of prompts are below it.
      prefill: lengths of prompts.
      decode: tokens of a decode run.
      beams: widths of beam searches.
      repeats: runs whose median counts; fewer of what takes long.
    """

    folder: Path
    vocab: int
    prefill: tuple[int, ...]
    decode: int
    beams: tuple[int, ...]
    repeats: int

    @property
    def lines(self) -> tuple[Line, ...]:
        """What is measured; what takes longest comes last."""
        return (
            Line(name="decode", prompt=PROMPT, decode=self.decode),
            *(Line(name=f"prefill {length}", prompt=length) for length in self.prefill),
            *(
                Line(name=f"{width} beams", prompt=PROMPT, decode=self.decode, beams=width)
                for width in self.beams
            ),
        )

    @property
    def max_seqs(self) -> int:
        """Sequences that an engine must run together."""
        return max(line.beams for line in self.lines)

    @property
    def max_tokens(self) -> int:
        """Tokens that its KV cache must hold."""
        return max(line.beams * (line.prompt + line.decode) for line in self.lines) + 16

    def prompt(self, length: int) -> list[int]:
        """Random tokens, the same for every way."""
        return np.random.default_rng(1).integers(0, self.vocab, length).tolist()


# (prompt, tokens, beams) -> seconds of prefill, and of decoding so many tokens after the first.
Run = Callable[[list[int], int, int], tuple[float, float]]


def warm_up(line: Line, task: Task, run: Run) -> None:
    """Compiles what a line needs; such steps are neither measured nor compared with predictions."""
    run(task.prompt(line.prompt), min(line.decode, WARM_UP_TOKENS), line.beams)


def rate(line: Line, task: Task, run: Run) -> float:
    """Tokens per second: of the prompt, or of the text that is decoded, however many beams."""
    prompt = task.prompt(line.prompt)
    seconds: list[float] = []
    while len(seconds) < task.repeats and sum(seconds) < LONG_SECONDS:
        filled, decoded = run(prompt, line.decode, line.beams)
        seconds.append(decoded if line.decode else filled)
    return (line.decode or line.prompt) / statistics.median(seconds)
