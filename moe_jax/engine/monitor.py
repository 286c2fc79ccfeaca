"""Compares what steps took with what was predicted for them, and keeps the totals.

Knows reports and seconds; never runs anything.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_jax.engine.runner import PREFILL_BUCKETS, StepReport
from moe_jax.engine.stats import Stats, StepTimes
from moe_jax.engine.work import WorkCosts, busy_seconds, work_costs
from moe_jax.placement.correction import Correction
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.planner import Mode
from moe_jax.placement.timeline import LANES


@dataclass(frozen=True)
class StepTime:
    """One step, sampling included.

    Attributes:
      tokens: new tokens that it ran, of prompts and of sequences that decode.
      prompt_tokens: those of prompts; 0 where all its sequences decode.
      sampled_tokens: tokens that it gave.
      seconds: wall-clock.
    """

    tokens: int
    prompt_tokens: int
    sampled_tokens: int
    seconds: float


@dataclass(frozen=True)
class _Foreseen:
    """A step as the curves have it, before correction.

    Attributes:
      seconds: what it should take.
      busy: seconds of work of each resource, dense weights included.
    """

    seconds: float
    busy: dict[str, float]


class Monitor:
    """Totals and corrections of one engine."""

    def __init__(self, memory: MemoryPlan, curves: CostCurves):
        self._totals = Stats(expert_bytes=memory.host_expert_bytes)
        self._curves = curves
        # Dense weights are taken to cost what a resident expert's do, byte for byte.
        self._dense_experts = memory.dense_bytes / memory.expert_bytes
        self._costs = work_costs(curves, PREFILL_BUCKETS[-1])
        self._prefill, self._decode = Correction(), Correction()

    def after_step(self, step: StepTime, reports: Sequence[StepReport]) -> None:
        """Takes in one step of a generation; long prefills have a report per chunk."""
        s = self._count(reports)
        parts = [self._foresee(report) for report in reports]
        comparable = not any(report.compiled for report in reports)
        kind = reports[0].tokens
        if step.prompt_tokens:
            s = replace(s, prefill_seconds=s.prefill_seconds + step.seconds)
            if comparable:
                times, self._prefill = _compare(self._prefill, kind, parts, step.seconds)
                s = replace(s, prefill_times=s.prefill_times + times)
        else:
            s = replace(s, decode_seconds=s.decode_seconds + step.seconds)
            s = replace(s, decode_tokens=s.decode_tokens + step.sampled_tokens)
            if comparable:
                times, self._decode = _compare(self._decode, kind, parts, step.seconds)
                s = replace(s, decode_times=s.decode_times + times)
        self._totals = replace(
            s,
            prompt_tokens=s.prompt_tokens + step.prompt_tokens,
            generated_tokens=s.generated_tokens + step.sampled_tokens,
        )

    def after_other(self, reports: Sequence[StepReport]) -> None:
        """Takes in steps that nobody timed."""
        self._totals = self._count(reports)

    def stats(self, traces: Counter, swaps: int) -> Stats:
        """The totals so far."""
        return replace(
            self._totals,
            prefill_error=self._prefill.error,
            decode_error=self._decode.error,
            traces=dict(traces),
            swapped=swaps,
        )

    def dense_seconds(self, tokens: int) -> float:
        """What a step of this many tokens should take outside the experts, before correction."""
        return self._dense_experts * float(self._costs_up_to(tokens).device[tokens])

    def _costs_up_to(self, tokens: int) -> WorkCosts:
        """Costs that reach this far: many sequences with guesses can be more than a chunk."""
        if tokens >= self._costs.device.size:
            self._costs = work_costs(self._curves, tokens)
        return self._costs

    def _count(self, reports: Sequence[StepReport]) -> Stats:
        """The totals and these steps, but for their time."""
        s = self._totals
        for report in reports:
            modes = np.bincount(np.ravel(report.tally.modes), minlength=len(Mode)).tolist()
            s = replace(
                s,
                resident=s.resident + modes[Mode.RESIDENT],
                streamed=s.streamed + modes[Mode.STREAM],
                hosted=s.hosted + modes[Mode.HOST],
                predicted_seconds=s.predicted_seconds + float(report.tally.predicted),
            )
        return s

    def _foresee(self, report: StepReport) -> _Foreseen:
        """Dense weights, then what the planner expected and the curves say of the experts."""
        tally, tokens = report.tally, report.tokens
        costs = self._costs_up_to(tokens)
        busy = busy_seconds(np.asarray(tally.modes), np.asarray(tally.counts), costs)
        dense = self.dense_seconds(tokens)
        busy["device"] += dense
        return _Foreseen(dense + float(tally.predicted), busy)


def _compare(
    correction: Correction, kind: int, parts: Sequence[_Foreseen], measured: float
) -> tuple[StepTimes, Correction]:
    """One measured step beside its prediction; nothing for the first of its kind."""
    predicted = sum(part.seconds for part in parts)
    following = correction.after(kind, predicted, measured)
    if following.judged_steps == correction.judged_steps:
        return StepTimes(), following
    ratio = correction.foresee(kind, 1.0)
    times = StepTimes(
        steps=1,
        measured=measured,
        predicted=ratio * predicted,
        **{lane: ratio * sum(part.busy[lane] for part in parts) for lane in LANES},
    )
    return times, following
