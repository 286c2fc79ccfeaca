"""Counts and times of everything an engine has done."""

import math
from dataclasses import dataclass, field, fields, replace

from host_offload.memory import format_bytes


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Measured seconds of steps beside what was predicted for the same steps.

    Only `measured` was: by the wall clock, over whole steps with sampling. No clock stands beside
    a resource inside a step, so the others are predictions: of the cost curves, each multiplied by
    how much longer earlier steps of its kind took than the curves said. Steps that compiled a
    program and the first of each kind are left out; swaps happen between steps.

    Attributes:
      steps: how many.
      measured: what they took.
      predicted: what they should have taken.
      device: work of the device in them: dense weights, resident and streamed experts.
      link: transfers of streamed experts.
      host: work of the host, starting it included.
      memory: reads of streamed and hosted experts from host memory, at its full rate.
    """

    steps: int = 0
    measured: float = 0.0
    predicted: float = 0.0
    device: float = 0.0
    link: float = 0.0
    host: float = 0.0
    memory: float = 0.0

    @property
    def exposed_waiting(self) -> float:
        """Predicted: seconds without work for the device, because link or host were still busy."""
        return max(0.0, self.predicted - self.device)  # without either, they differ by rounding

    @property
    def measured_less_device(self) -> float:
        """Measured seconds beyond the device's predicted work.

        What `exposed_waiting` turned out to be, if the device's work was predicted well; it also
        holds what no curve knows of, such as sampling.
        """
        return self.measured - self.device

    def __add__(self, other: "StepTimes") -> "StepTimes":
        return StepTimes(**{name: getattr(self, name) + getattr(other, name) for name in _TIMES})

    def __sub__(self, other: "StepTimes") -> "StepTimes":
        return StepTimes(**{name: getattr(self, name) - getattr(other, name) for name in _TIMES})

    def __str__(self) -> str:
        return (
            f"measured {self.measured:.3g} s, predicted {self.predicted:.3g} s | predicted work: "
            f"device {self.device:.3g} s, link {self.link:.3g} s, host {self.host:.3g} s, "
            f"memory {self.memory:.3g} s | device waits {self.exposed_waiting:.3g} s as "
            f"predicted, {self.measured_less_device:.3g} s measured beyond its work"
        )


_TIMES = tuple(field.name for field in fields(StepTimes))


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals since the engine was loaded.

    Attributes:
      prompt_tokens, generated_tokens: tokens prefilled and sampled.
      cached_tokens: tokens of prompts that were not computed, because earlier requests had.
      restarts: how often a request lost its pages to others, and was prefilled again.
      decode_tokens: those of the sampled tokens that a step without any prompt gave.
      prefill_seconds, decode_seconds: wall-clock of steps with and without tokens of prompts,
        compilation included; a step that was started ahead counts from the end of the one before.
      compiled_seconds: those of them that passed in steps for which a program was compiled.
      resident, streamed, hosted: expert executions by where the plan put them; one execution is
        one expert in one layer of one step, for however many tokens. Of experts that were cut, here
        and below, it is one piece.
      swapped: experts that changed places with a resident one, between steps.
      failed_swaps: those that could not, for want of memory; they stay where they are.
      expert_bytes: bytes of one expert in host memory.
      prefetched: experts brought over for a layer before it was known that it needs them.
      prefetched_useful: those that it did need; they count as resident.
      predicted_seconds: what the planner expected the expert parts to take.
      bound_seconds: what no plan could have beaten for them, by the same costs.
      prefill_error, decode_error: the share of their time by which steps were mispredicted, with
        corrections from earlier steps; None before there was a second step of one kind.
      prefill_times, decode_times: those steps, measured and predicted, by resource.
      traces: how often each program was traced, by (name, bucket, ...).
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    restarts: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compiled_seconds: float = 0.0
    decode_tokens: int = 0
    resident: int = 0
    streamed: int = 0
    hosted: int = 0
    swapped: int = 0
    failed_swaps: int = 0
    expert_bytes: int = 0
    prefetched: int = 0
    prefetched_useful: int = 0
    predicted_seconds: float = 0.0
    bound_seconds: float = 0.0
    prefill_error: float | None = None
    decode_error: float | None = None
    prefill_times: StepTimes = field(default_factory=StepTimes)
    decode_times: StepTimes = field(default_factory=StepTimes)
    traces: dict[tuple, int] = field(default_factory=dict)

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens per second of the decode steps."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def hit_rate(self) -> float:
        """The share of expert executions that found the expert on the device."""
        total = self.resident + self.streamed + self.hosted
        return self.resident / total if total else 0.0

    @property
    def plan_excess(self) -> float | None:
        """By which share plans were predicted to take longer than the best possible, at most.

        The certificate of the plans that ran; None before there was one that ends.
        """
        if not (self.bound_seconds > 0 and math.isfinite(self.predicted_seconds)):
            return None
        return max(0.0, self.predicted_seconds / self.bound_seconds - 1)

    @property
    def bytes_streamed(self) -> int:
        """Expert weights copied from the host to the device, for one call or to stay."""
        return (self.streamed + self.swapped + self.prefetched) * self.expert_bytes

    @property
    def bytes_returned(self) -> int:
        """Expert weights copied from the device back to the host, when others took their slots."""
        return self.swapped * self.expert_bytes

    @property
    def bytes_hosted(self) -> int:
        """Expert weights read by the host."""
        return self.hosted * self.expert_bytes

    @property
    def exposed_waiting(self) -> float:
        """Predicted seconds in which the device waited for link or host; see `StepTimes`."""
        return self.prefill_times.exposed_waiting + self.decode_times.exposed_waiting

    def since(self, before: "Stats") -> "Stats":
        """What was added to earlier totals; traces and errors stay those of the whole time."""
        added = {
            name: getattr(self, name) - getattr(before, name)
            for name in vars(self)
            if name not in ("expert_bytes", "traces", "prefill_error", "decode_error")
        }
        return replace(self, **added)

    def __str__(self) -> str:
        return (
            f"prefill {self.prompt_tokens} tokens at {self.prefill_rate:.1f}/s, "
            f"decode {self.decode_tokens} tokens at {self.decode_rate:.1f}/s"
            + self._compiled_text()
            + f" | experts: {self.resident} resident ({self.hit_rate:.0%}), "
            f"{self.streamed} streamed, {self.hosted} on host, {self.swapped} swapped in"
            + self._failed_text()
            + f" | moved {format_bytes(self.bytes_streamed)} to the device, "
            f"read {format_bytes(self.bytes_hosted)} on the host"
            + self._excess_text()
            + self._prefetch_text()
            + self._cache_text()
            + _error_text("prefill", self.prefill_error)
            + _error_text("decode", self.decode_error)
            + _times_text("prefill", self.prefill_times)
            + _times_text("decode", self.decode_times)
        )

    def _compiled_text(self) -> str:
        if not self.compiled_seconds:
            return ""
        return f", {self.compiled_seconds:.3g} s of it in steps that compiled a program"

    def _failed_text(self) -> str:
        return f", {self.failed_swaps} could not be" * bool(self.failed_swaps)

    def _excess_text(self) -> str:
        if self.plan_excess is None or not self.streamed + self.hosted:
            return ""
        return f" | plans within {self.plan_excess:.1%} of the best possible"

    def _prefetch_text(self) -> str:
        if not self.prefetched:
            return ""
        return f" | {self.prefetched} prefetched, {self.prefetched_useful} of use"

    def _cache_text(self) -> str:
        text = f" | {self.cached_tokens} prompt tokens from the KV cache" * bool(self.cached_tokens)
        return text + f" | {self.restarts} restarts" * bool(self.restarts)


def _error_text(phase: str, error: float | None) -> str:
    return "" if error is None else f" | {phase} predicted within {error:.0%}"


def _times_text(phase: str, times: StepTimes) -> str:
    steps = f"{times.steps} {phase} step{'s' if times.steps > 1 else ''}"
    return f"\n{steps}: {times}" if times.steps else ""
