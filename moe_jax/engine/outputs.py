"""What generation returns."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
      text: the decoded tokens, without the end-of-text token, cut before a stop string.
      tokens: every generated token, the end-of-text token included.
      logprobs: the model's log-probability of each of them.
      finish_reason: "stop" at an end-of-text token or stop string, "length" when max_tokens or
        the KV capacity was reached.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one step adds to a stream: whole characters only, so `text` may be empty.

    `finish_reason` is None until the last piece.
    """

    text: str
    token: int
    logprob: float
    finish_reason: FinishReason | None = None
