"""Counts and times of everything an engine has done."""

from dataclasses import dataclass, field, replace

from host_offload.memory import format_bytes


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Totals since the engine was loaded.

    Attributes:
      prompt_tokens, generated_tokens: tokens prefilled and sampled.
      decode_tokens: those of the sampled tokens that a decode step gave, not a prefill.
      prefill_seconds, decode_seconds: wall-clock, compilation included.
      resident, streamed, hosted: expert executions by where the plan put them; one execution is
        one expert in one layer of one step, for however many tokens.
      swapped: experts that changed places with a resident one, between steps.
      expert_bytes: bytes of one expert.
      predicted_seconds: what the planner expected the expert parts to take.
      prefill_error, decode_error: the share of their time by which steps were mispredicted, with
        corrections from earlier steps; None before there was a second step of one kind.
      traces: how often each program was traced, by (name, bucket, ...).
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_tokens: int = 0
    resident: int = 0
    streamed: int = 0
    hosted: int = 0
    swapped: int = 0
    expert_bytes: int = 0
    predicted_seconds: float = 0.0
    prefill_error: float | None = None
    decode_error: float | None = None
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
    def bytes_streamed(self) -> int:
        """Expert weights copied from the host to the device, for one call or to stay."""
        return (self.streamed + self.swapped) * self.expert_bytes

    @property
    def bytes_hosted(self) -> int:
        """Expert weights read by the host."""
        return self.hosted * self.expert_bytes

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
            f"decode {self.decode_tokens} tokens at {self.decode_rate:.1f}/s | experts: "
            f"{self.resident} resident ({self.hit_rate:.0%}), {self.streamed} streamed, "
            f"{self.hosted} on host, {self.swapped} swapped in | "
            f"moved {format_bytes(self.bytes_streamed)} to the device, "
            f"read {format_bytes(self.bytes_hosted)} on the host"
            + _error_text("prefill", self.prefill_error)
            + _error_text("decode", self.decode_error)
        )


def _error_text(phase: str, error: float | None) -> str:
    return "" if error is None else f" | {phase} predicted within {error:.0%}"
