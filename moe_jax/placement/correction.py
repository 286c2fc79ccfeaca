"""Corrects predicted times by what was measured before.

Knows kinds of steps by name and seconds; neither clocks nor plans.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

# A measurement moves the ratio a quarter of the way, and by a factor of 4 at most: one step that
# the machine was busy with something else for must not upset the next hundred.
_SHARE = 0.25
_MOST = 4.0


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Measured over predicted seconds for each kind of step, and how good predictions were.

    Attributes:
      ratios: moving averages, by kind.
      judged_steps: steps of a kind that had a ratio already.
      off_seconds: by how much their corrected predictions were off, made from earlier steps only.
      measured_seconds: what they took.
    """

    ratios: Mapping[Hashable, float] = field(default_factory=dict)
    judged_steps: int = 0
    off_seconds: float = 0.0
    measured_seconds: float = 0.0

    def foresee(self, kind: Hashable, predicted: float) -> float:
        """The corrected prediction in seconds; an unknown kind is not corrected."""
        return self.ratios.get(kind, 1.0) * predicted

    def after(self, kind: Hashable, predicted: float, measured: float) -> "Correction":
        """This correction and one more measured step. Predictions of 0 or infinity teach nothing.

        Raises:
          ValueError: the step took no time.
        """
        if not measured > 0:
            raise ValueError(f"a step must take some time, got {measured} s for {kind}")
        if not 0 < predicted < float("inf"):
            return self
        ratio = measured / predicted
        old = self.ratios.get(kind)
        if old is None:
            return replace(self, ratios={**self.ratios, kind: ratio})
        bounded = min(max(ratio, old / _MOST), old * _MOST)
        return replace(
            self,
            ratios={**self.ratios, kind: old + _SHARE * (bounded - old)},
            judged_steps=self.judged_steps + 1,
            off_seconds=self.off_seconds + abs(old * predicted - measured),
            measured_seconds=self.measured_seconds + measured,
        )

    @property
    def error(self) -> float | None:
        """By which share of their time steps were mispredicted; None before the first."""
        return self.off_seconds / self.measured_seconds if self.judged_steps else None
