"""Corrects predicted times by what was measured before.

Knows kinds of steps by name and seconds; neither clocks nor plans.
"""

import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

# The middle of the last nine: a step that the machine was busy with something else for counts no
# more than any other, and so does the next one, which its tokens make look short.
_REMEMBERED = 9


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Measured over predicted seconds for each kind of step, and how good predictions were.

    Attributes:
      ratios: those of the latest steps, by kind.
      judged_steps: steps of a kind that had a ratio already.
      off_seconds: by how much their corrected predictions were off, made from earlier steps only.
      measured_seconds: what they took.
    """

    ratios: Mapping[Hashable, tuple[float, ...]] = field(default_factory=dict)
    judged_steps: int = 0
    off_seconds: float = 0.0
    measured_seconds: float = 0.0

    def foresee(self, kind: Hashable, predicted: float) -> float:
        """The corrected prediction in seconds; an unknown kind is not corrected."""
        return statistics.median(self.ratios.get(kind, (1.0,))) * predicted

    def after(self, kind: Hashable, predicted: float, measured: float) -> "Correction":
        """This correction and one more measured step. Predictions of 0 or infinity teach nothing.

        Raises:
          ValueError: the step took no time.
        """
        if not measured > 0:
            raise ValueError(f"a step must take some time, got {measured} s for {kind}")
        if not 0 < predicted < float("inf"):
            return self
        known = self.ratios.get(kind, ())
        latest = (*known, measured / predicted)[-_REMEMBERED:]
        learned = replace(self, ratios={**self.ratios, kind: latest})
        if not known:
            return learned
        return replace(
            learned,
            judged_steps=self.judged_steps + 1,
            off_seconds=self.off_seconds + abs(self.foresee(kind, predicted) - measured),
            measured_seconds=self.measured_seconds + measured,
        )

    @property
    def error(self) -> float | None:
        """By which share of their time steps were mispredicted; None before the first."""
        return self.off_seconds / self.measured_seconds if self.judged_steps else None
