"""What every measure needs: a row of the table, how much is measured, prompts, taking turns.

Knows nothing of what is measured.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

import moe_jax

Prompts = list[list[int]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      measured: the numbers it rests on, by name, each with its unit in the name.
      result: what is compared with the target.
      target: a number; None: there is none.
      at_least: whether the result should be at least the target, or at most.
    """

    measure: str
    measured: dict[str, float]
    result: float
    unit: str = "x"
    target: float | None = None
    at_least: bool = True
    runs: dict[str, list[float]] = field(default_factory=dict)

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.result >= self.target if self.at_least else self.result <= self.target


@dataclass(frozen=True)
class Sizes:
    """How much is measured; the defaults are those of the targets."""

    together: int = 16
    prompt: int = 32
    tokens: int = 64
    beams: tuple[int, ...] = (4, 8, 16)
    beam_tokens: int = 33
    long_prompt: int = 1024
    decoding: int = 4
    running: int = 64
    shared: int = 1000
    lookup: int = 7
    lookup_tokens: int = 128
    repeats: int = 5


class Texts:
    """Random prompts, no two alike, so that none finds its beginning in the prefix index."""

    def __init__(self, engine: moe_jax.Engine):
        self._rng = np.random.default_rng(1)
        self._vocab = engine.config.vocab

    def take(self, length: int) -> list[int]:
        return self._rng.integers(1, self._vocab, length).tolist()

    def several(self, count: int, length: int) -> Prompts:
        return [self.take(length) for _ in range(count)]


def alternate(repeats: int, **runs: Callable[[], float]) -> dict[str, list[float]]:
    """What each run returned; A, B, A, B ... after one of each that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run())
    return times


def medians(runs: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in runs.items()}
