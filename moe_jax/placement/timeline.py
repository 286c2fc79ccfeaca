"""When each resource works on which expert during a step, as the plan has it.

Knows counts, modes and costs; what was really going on is for a profiler to say.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.pieces import Pieces
from moe_jax.placement.planner import Mode

# Memory is the host's, read by whoever uses an expert that is not resident: its lane shows how long
# the reads of a layer take at the full rate, and not when which of them comes.
LANES = ("device", "link", "host", "memory")
_BLOCKS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, kw_only=True)
class Span:
    """One piece of work: seconds since the step began, expert -1 for the dense part of a layer."""

    lane: str
    layer: int
    expert: int
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The spans of one step, in the order of their layers; it prints itself.

    Attributes:
      spans: the work.
      seconds: when the last layer ends.
    """

    spans: tuple[Span, ...]
    seconds: float

    @property
    def layer_starts(self) -> dict[int, float]:
        """When each layer with work begins: when the one before has ended."""
        starts, end = {}, 0.0
        for layer, spans in groupby(self.spans, key=lambda span: span.layer):
            starts[layer] = end
            end = max(span.end for span in spans)
        return starts

    def busy(self, lane: str) -> float:
        """The share of the step in which a lane works."""
        total = sum(span.end - span.start for span in self.spans if span.lane == lane)
        return total / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        lines = [f"{self.seconds * 1e3:.3g} ms as planned"]
        for lane in LANES:
            cells = "".join(_BLOCKS[round(share * 8)] for share in self._shares(lane, 64))
            lines.append(f"{lane:<7}|{cells}| {self.busy(lane):4.0%}")
        return "\n".join(lines)

    def _shares(self, lane: str, cells: int) -> np.ndarray:
        """How busy a lane is in each of `cells` equal parts of the step, 0 to 1."""
        edges = np.linspace(0, self.seconds, cells + 1)
        work = np.zeros(cells)
        for span in self.spans:
            if span.lane == lane:
                overlap = np.minimum(edges[1:], span.end) - np.maximum(edges[:-1], span.start)
                work += np.maximum(overlap, 0)
        return np.minimum(work * cells / self.seconds, 1) if self.seconds else work


def make_timeline(
    counts: Int[np.ndarray, "layers experts"],
    modes: Int[np.ndarray, "layers items"],
    curves: CostCurves,
    dense_seconds: float = 0.0,
    pieces: Pieces | None = None,
) -> Timeline:
    """Plays a step through.

    Args:
      counts: tokens routed to each expert; zero in dense layers.
      modes: a `Mode` for each expert, or for each piece of each expert.
      curves: costs of an expert.
      dense_seconds: what a layer takes on the device before its experts start.
      pieces: how missing experts are cut, as `pieces.plan_pieces` has planned; None: not at all.
    """
    pieces = Pieces(count=1, curves=curves) if pieces is None else pieces
    spans: list[Span] = []
    now = 0.0
    for layer in range(counts.shape[0]):
        if dense_seconds:
            end = now + dense_seconds
            spans.append(Span(lane="device", layer=layer, expert=-1, start=now, end=end))
            now = end
        work = list(_layer(layer, now, counts[layer], modes[layer], curves, pieces))
        spans += work
        now = max([now, *(span.end for span in work)])
    return Timeline(spans=tuple(spans), seconds=now)


def _layer(
    layer: int,
    start: float,
    counts: np.ndarray,
    modes: np.ndarray,
    curves: CostCurves,
    pieces: Pieces,
) -> Iterator[Span]:
    """The spans of one layer's experts; where lanes cannot overlap, one waits for the other."""
    tokens = jnp.asarray(counts, jnp.int32)
    resident = np.asarray(curves.device_seconds(tokens))
    device = np.asarray(pieces.curves.device_seconds(tokens))
    host = np.asarray(pieces.curves.host_seconds(tokens))
    stream, memory = float(pieces.curves.stream), float(pieces.curves.memory)

    def span(lane: str, expert: int, begin: float, seconds: float) -> Span:
        return Span(lane=lane, layer=layer, expert=expert, start=begin, end=begin + seconds)

    order = np.argsort(-counts, kind="stable")
    modes = modes.reshape(-1, pieces.count)[order]
    # Experts once for each of their pieces there, so in the order of the pieces.
    on_host = order.repeat((modes == Mode.HOST).sum(1)).tolist()
    streamed = order.repeat((modes == Mode.STREAM).sum(1)).tolist()
    now = start
    for expert in order[modes[:, 0] == Mode.RESIDENT].tolist():
        yield span("device", expert, now, float(resident[expert]))
        now += float(resident[expert])
    link = (start if curves.link_beside > 0 else now) + float(curves.link_latency)
    for expert in streamed:
        yield span("link", expert, link, stream)
        link += stream
        now = max(now, link)
        yield span("device", expert, now, float(device[expert]))
        now += float(device[expert])
        if curves.link_beside <= 0:
            link = now
    at = (start if curves.host_beside > 0 else now) + float(curves.host_launch)
    for expert in on_host:
        yield span("host", expert, at, float(host[expert]))
        at += float(host[expert])
    at = start
    for expert in streamed + on_host:
        if memory > 0:
            yield span("memory", expert, at, memory)
            at += memory
