"""Compares what steps took with what was predicted for them, and keeps the totals.

Knows reports and seconds; never runs anything.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp

from moe_jax.engine.generation import StepTime
from moe_jax.engine.runner import StepReport
from moe_jax.engine.stats import Stats
from moe_jax.placement.correction import Correction
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.planner import Mode


class Monitor:
    """Totals and corrections of one engine."""

    def __init__(self, memory: MemoryPlan, curves: CostCurves):
        self._totals = Stats(expert_bytes=memory.expert_bytes)
        self._curves = curves
        # Dense weights are taken to cost what a resident expert's do, byte for byte.
        self._dense_experts = memory.dense_bytes / memory.expert_bytes
        self._dense_seconds: dict[int, float] = {}
        self._prefill, self._decode = Correction(), Correction()

    def after_step(self, step: StepTime, reports: Sequence[StepReport]) -> None:
        """Takes in one step of a generation; long prefills have a report per chunk."""
        predicted = sum(self._foresee(report) for report in reports)
        self.after_other(reports)
        s = self._totals
        if step.prompt_tokens:
            s = replace(s, prefill_seconds=s.prefill_seconds + step.seconds)
        else:
            s = replace(s, decode_seconds=s.decode_seconds + step.seconds)
            s = replace(s, decode_tokens=s.decode_tokens + step.sampled_tokens)
        self._totals = replace(
            s,
            prompt_tokens=s.prompt_tokens + step.prompt_tokens,
            generated_tokens=s.generated_tokens + step.sampled_tokens,
        )
        if any(report.compiled for report in reports):
            return
        kind = reports[0].tokens
        if step.prompt_tokens:
            self._prefill = self._prefill.after(kind, predicted, step.seconds)
        else:
            self._decode = self._decode.after(kind, predicted, step.seconds)

    def after_other(self, reports: Sequence[StepReport]) -> None:
        """Takes in steps that nobody timed."""
        for report in reports:
            s, modes = self._totals, [int(n) for n in report.tally.experts_by_mode]
            self._totals = replace(
                s,
                resident=s.resident + modes[Mode.RESIDENT],
                streamed=s.streamed + modes[Mode.STREAM],
                hosted=s.hosted + modes[Mode.HOST],
                predicted_seconds=s.predicted_seconds + float(report.tally.predicted),
            )

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
        if tokens not in self._dense_seconds:
            seconds = float(self._curves.device_seconds(jnp.int32(tokens)))
            self._dense_seconds[tokens] = self._dense_experts * seconds
        return self._dense_seconds[tokens]

    def _foresee(self, report: StepReport) -> float:
        """Seconds of one step before correction: dense weights, then what the planner expected."""
        return self.dense_seconds(report.tokens) + float(report.tally.predicted)
