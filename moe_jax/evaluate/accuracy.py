"""How often something was right, and how far that can be trusted."""

import math
from dataclasses import dataclass

# The two-sided 95 % point of the normal distribution.
_Z = 1.96


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of all.

    Attributes:
      right, total: counts.
    """

    right: int
    total: int

    @property
    def share(self) -> float:
        """Right answers as a part of all; NaN of none."""
        return self.right / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share (Wilson 1927), which holds near 0 and 1 too."""
        if not self.total:
            return 0.0, 1.0
        spread = _Z * _Z / self.total
        middle = (self.share + spread / 2) / (1 + spread)
        half = _Z * math.sqrt(self.share * (1 - self.share) / self.total + spread / self.total / 4)
        return max(0.0, middle - half / (1 + spread)), min(1.0, middle + half / (1 + spread))

    def __add__(self, other: "Accuracy") -> "Accuracy":
        return Accuracy(self.right + other.right, self.total + other.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({low:.1%} to {high:.1%}, {self.right} of {self.total})"
