"""What generation returns."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
# (token, log-probability), the likeliest first.
TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one request, from when it was submitted.

    Attributes:
      queued: until its first step began.
      first_token: until its first token was there; None if it has none.
      total: until it ended.
      per_token: on average between its tokens after the first; None if it has only one.
    """

    queued: float
    first_token: float | None
    total: float
    per_token: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
      text: the decoded tokens, without the end-of-text token, cut before a stop string.
      tokens: every generated token, the end-of-text token included.
      logprobs: the model's log-probability of each of them; of a beam, what each token added to
        its score, which penalties have changed.
      finish_reason: "stop" at an end-of-text token or stop string, "length" when max_tokens or
        the KV capacity was reached, "cancelled" when it was cancelled.
      top_logprobs: per token the likeliest tokens, as many as `logprobs=` asked for.
      score: of a beam: sum of log-probabilities over length to the power of length_penalty.
      prompt_tokens: tokens of the prompt.
      cached_tokens: those of them that were not computed, because an earlier request had.
      timing: seconds it took.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    top_logprobs: tuple[TopLogprobs, ...] = ()
    score: float | None = None
    prompt_tokens: int
    cached_tokens: int
    timing: Timing


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What one step adds to a stream: whole characters only, so `text` may be empty.

    The last piece has a `finish_reason` and the whole `completion`. It has no token if the request
    was cancelled, or if it is the text of a beam search, which comes at once.
    """

    text: str
    token: int | None
    logprob: float
    finish_reason: FinishReason | None = None
    top_logprobs: TopLogprobs = ()
    completion: Completion | None = None
