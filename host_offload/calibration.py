"""Costs of one unit of work by its size, as numbers: timings, curves that never fall, fits.

Knows neither clocks nor devices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Where a curve is taken: costs are flat at first, then linear.
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing that was timed several times."""

    median: float
    p90: float

    def scaled(self, factor: float) -> "Timing":
        """The same, every time multiplied."""
        return Timing(median=self.median * factor, p90=self.p90 * factor)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What some work takes at each of several sizes; neither tuple ever falls.

    Attributes:
      seconds: medians.
      p90: nine of ten runs took no longer.
      measured: False where the numbers were inferred from other sizes, for want of time.
    """

    seconds: tuple[float, ...]
    p90: tuple[float, ...]
    measured: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one unit of work, such as one expert's, costs on this machine.

    Attributes:
      sizes: how many rows the work was done on; increasing.
      host: seconds on the host CPU, its arrays being in host memory.
      device: seconds on the device, its arrays being there.
      work_bytes: bytes of those arrays.
      transfer: seconds to bring them to the device, over the link where there is one.
      link_latency: seconds to start doing so.
      host_launch: seconds for the round trip of a host call that does next to nothing.
      read_rate: bytes per second at which the host's memory is read, at most: by the host, and on
        a GPU by the link beside it. No less than the work itself reached.
      spent: seconds that measuring took.
    """

    sizes: tuple[int, ...]
    host: Curve
    device: Curve
    work_bytes: int
    transfer: float
    link_latency: float
    host_launch: float
    read_rate: float
    spent: float


def timing_of(seconds: Sequence[float]) -> Timing:
    """Sums up times; differences of times may be zero or less, which nothing can take."""
    times = np.maximum(np.asarray(seconds, np.float64), 1e-9)
    return Timing(median=float(np.median(times)), p90=float(np.quantile(times, 0.9)))


def rising(values: Sequence[float]) -> tuple[float, ...]:
    """The closest sequence that never falls (isotonic regression, by pooling neighbours)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        pools.append((mean, count))
    return tuple(mean for mean, count in pools for _ in range(count))


def curve_of(sizes: Sequence[int], timings: Mapping[int, Timing]) -> Curve:
    """A rising curve through timings at some of the sizes.

    Between them it is linear; past the last one the last slope goes on, but no steeper than a line
    from nothing. Before the first one it is flat.
    """
    known = sorted(timings)
    medians = rising([timings[size].median for size in known])
    p90 = rising([timings[size].p90 for size in known])
    # Rounding may make an inferred number fall.
    seconds = np.maximum.accumulate([_read(size, known, medians) for size in sizes])
    slow = np.maximum.accumulate([_read(size, known, p90) for size in sizes])
    return Curve(
        seconds=tuple(seconds.tolist()),
        p90=tuple(np.maximum(slow, seconds).tolist()),
        measured=tuple(size in timings for size in sizes),
    )


def _read(size: int, known: Sequence[int], values: Sequence[float]) -> float:
    if size <= known[-1] or len(known) == 1:
        return float(np.interp(size, known, values))
    slope = min(float(values[-1] - values[-2]) / (known[-1] - known[-2]), values[-1] / known[-1])
    return float(values[-1] + slope * (size - known[-1]))


def fit_line(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """The latency, not negative, and the seconds per item of times that grow with a count."""
    slope, start = np.polyfit(np.asarray(counts, np.float64), np.asarray(seconds, np.float64), 1)
    if slope <= 0 or start < 0:  # noise: the mean per item explains them best
        return 0.0, float(np.sum(seconds) / np.sum(counts))
    return float(start), float(slope)


def fit_flat_then_linear(
    sizes: Sequence[int], seconds: Sequence[float]
) -> tuple[float, float, float]:
    """Fits seconds = start + max(floor, per_row * size), with relative errors.

    Every split into sizes on the flat part and sizes on the line is tried. Returns (start, floor,
    per_row), none negative. With the bytes and the operations of the work, floor tells the rate
    of memory and per_row that of arithmetic. Where all is flat, start and floor cannot be told
    apart, and start is 0; where nothing is, floor is what the first size takes on the line.
    """
    x, y = np.asarray(sizes, np.float64), np.asarray(seconds, np.float64)
    candidates = [(0.0, _relative_mean(y), 0.0)]
    for flat in range(len(x) - 1):
        start, slope = _relative_line(x[flat:], y[flat:])
        level = _relative_mean(y[:flat]) if flat else start + slope * x[0]
        candidates.append((start, max(level - start, 0.0), slope))

    def error(candidate: tuple[float, float, float]) -> float:
        start, floor, slope = candidate
        return float((((start + np.maximum(floor, slope * x)) / y - 1) ** 2).sum())

    start, floor, slope = min(candidates, key=error)
    return float(start), float(floor), float(slope)


def _relative_mean(y: np.ndarray) -> float:
    """The level from which all values are least far off, relative to themselves."""
    return float((1 / y).sum() / (1 / y**2).sum())


def _relative_line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(start, slope) of the line from which values are least far off, neither negative."""
    columns = np.stack([1 / y, x / y], axis=1)
    (start, slope), *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    if start < 0:
        return 0.0, float((x / y).sum() / ((x / y) ** 2).sum())
    return float(start), max(float(slope), 0.0)
