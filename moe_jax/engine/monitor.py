"""Compares what steps took with what was predicted for them, and keeps the totals.

Knows reports and seconds; never runs anything.
"""

import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_jax.engine.batch import PREFILL_BUCKETS
from moe_jax.engine.runner import StepReport
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


class Monitor:
    """Totals and corrections of one engine.

    What it is told waits until somebody asks, or tells it to catch up: the engine does so while the
    device works on the next step.
    """

    def __init__(self, memory: MemoryPlan, curves: CostCurves):
        self._waiting: deque[tuple[StepTime | None, Sequence[StepReport]]] = deque()
        self._lock = threading.Lock()
        self._totals = Stats(expert_bytes=memory.host_expert_bytes)
        self._curves = curves
        # Dense weights are taken to cost what a resident expert's do, byte for byte.
        self._dense_experts = memory.dense_bytes / memory.expert_bytes
        self._costs = work_costs(curves, PREFILL_BUCKETS[-1])
        self._corrections = {"prefill": Correction(), "decode": Correction()}

    def after_step(self, step: StepTime, reports: Sequence[StepReport]) -> None:
        """Notes one step of a generation; long prefills have a report per chunk."""
        self._waiting.append((step, reports))

    def after_other(self, reports: Sequence[StepReport]) -> None:
        """Notes steps that nobody timed."""
        self._waiting.append((None, reports))

    def catch_up(self) -> None:
        """Takes in what it was told; from any thread."""
        with self._lock:
            while self._waiting:
                step, unread = self._waiting.popleft()
                reports = [report.read() for report in unread]
                added = self._counted(reports)
                if step is not None:
                    added |= self._timed(step, reports)
                totals = {name: getattr(self._totals, name) + more for name, more in added.items()}
                self._totals = replace(self._totals, **totals)

    def stats(self, traces: Counter) -> Stats:
        """The totals of what it was told so far."""
        self.catch_up()
        return replace(
            self._totals,
            prefill_error=self._corrections["prefill"].error,
            decode_error=self._corrections["decode"].error,
            traces=dict(traces),
        )

    def dense_seconds(self, tokens: int) -> float:
        """What a step of this many tokens should take outside the experts, before correction."""
        return self._dense_experts * float(self._costs_up_to(tokens).device[tokens])

    def _costs_up_to(self, tokens: int) -> WorkCosts:
        """Costs that reach this far: many sequences with guesses can be more than a chunk."""
        if tokens >= self._costs.device.size:
            self._costs = work_costs(self._curves, tokens)
        return self._costs

    def _counted(self, reports: Sequence[StepReport]) -> dict[str, Any]:
        """What these steps add to the totals, but for their time."""
        modes, predicted, least = np.zeros(len(Mode), np.int64), 0.0, 0.0
        for report in reports:
            modes += np.bincount(np.ravel(report.tally.modes), minlength=len(Mode))
            predicted += float(report.tally.predicted)
            least += float(report.tally.lower_bound)
        _, resident, streamed, hosted = modes.tolist()
        return {
            "resident": resident,
            "streamed": streamed,
            "hosted": hosted,
            "predicted_seconds": predicted,
            "bound_seconds": least,
        }

    def _timed(self, step: StepTime, reports: Sequence[StepReport]) -> dict[str, Any]:
        """What a step adds to the totals of its phase."""
        phase = "prefill" if step.prompt_tokens else "decode"
        added: dict[str, Any] = {
            "prompt_tokens": step.prompt_tokens,
            "generated_tokens": step.sampled_tokens,
            f"{phase}_seconds": step.seconds,
        }
        if phase == "decode":
            added["decode_tokens"] = step.sampled_tokens
        if any(report.compiled for report in reports):
            added["compiled_seconds"] = step.seconds
        else:
            added[f"{phase}_times"] = self._compare(phase, reports, step.seconds)
        return added

    def _compare(self, phase: str, reports: Sequence[StepReport], measured: float) -> StepTimes:
        """One measured step beside its prediction; nothing for the first of its kind.

        Predicted are dense weights, then what the planner expected; the work of each resource is
        what the curves say of dense weights and experts.
        """
        work, predicted = np.zeros(len(LANES)), 0.0
        for report in reports:
            tally, costs = report.tally, self._costs_up_to(report.tokens)
            dense = self.dense_seconds(report.tokens)
            modes, counts = np.asarray(tally.modes), np.asarray(tally.counts)
            work += list(busy_seconds(modes, counts, costs).values())
            work[LANES.index("device")] += dense
            predicted += dense + float(tally.predicted)
        correction, kind = self._corrections[phase], reports[0].tokens
        following = correction.after(kind, predicted, measured)
        self._corrections[phase] = following
        if following.judged_steps == correction.judged_steps:
            return StepTimes()
        ratio = correction.foresee(kind, 1.0)
        lanes = dict(zip(LANES, (ratio * work).tolist(), strict=True))
        return StepTimes(steps=1, measured=measured, predicted=ratio * predicted, **lanes)
