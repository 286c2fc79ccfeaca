"""One text while it is continued: its tokens, its place in the KV cache, and what it shows so far.

Knows stopping and detokenisation; neither scheduling, nor sampling, nor arrays of a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_jax.cache.kv_rows import SharedPrefix
from moe_jax.decoding.prompt_lookup import draft
from moe_jax.decoding.stop_strings import StopScanner
from moe_jax.decoding.stream_decoder import StreamDecoder
from moe_jax.engine.handle import Handle
from moe_jax.engine.outputs import Completion, FinishReason, Piece, Timing, TopLogprobs
from moe_jax.engine.request import Request
from moe_jax.engine.scheduler import Job


@dataclass(frozen=True)
class Drawn:
    """A sampled token, its log-probability, and the likeliest tokens where they were asked for."""

    token: int
    logprob: float
    top: TopLogprobs = ()


class Continuation(Job):
    """A request for one text.

    Attributes:
      tokens: of the prompt and of the text so far; all but the last are in the pages when it is
        sampled from.
      draft: guesses of what follows, to be verified by the next step.
      row: its row of KV pages while it runs.
      prefix: what it shares with other requests.
    """

    def __init__(
        self,
        request: Request,
        handle: Handle,
        *,
        exact_again: bool,
    ):
        """`exact_again`: whether its keys are the same if they are computed again, or by others."""
        super().__init__(
            prompt=len(request.prompt),
            limit=len(request.prompt) + request.limit - 1,
            priority=request.params.priority,
            restartable=exact_again,
        )
        self.request = request
        self.handle = handle
        self.tokens = list(request.prompt)
        self.draft: list[int] = []
        self.rows: list[int] = []
        self.prefix = SharedPrefix(exact_again)
        self._decoder: StreamDecoder | None = None
        if request.tokenizer is not None:
            self._decoder = StreamDecoder(request.tokenizer, request.context)
        self._scanner = StopScanner(request.params.stop)
        self._drawn: list[Drawn] = []
        self._text: list[str] = []
        self._last: Piece | None = None

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def new_tokens(self) -> int:
        """How many tokens there are after the prompt."""
        return len(self.tokens) - len(self.request.prompt)

    def begin(self, rows: list[int], cached: int) -> None:
        """Starts, or starts again, with this many tokens in the pages of its row."""
        self.rows, self.length = rows, cached
        self.prompt = len(self.tokens)
        self.todo = self.prompt - cached
        self.decoding = False
        self.handle.began(cached)

    def stop(self) -> None:
        """Has lost its pages and waits to compute them again."""
        self.rows, self.draft, self.length, self.ahead = [], [], 0, 0
        self.prompt = self.todo = len(self.tokens)
        self.decoding = False
        self.prefix = SharedPrefix(self.restartable)

    def inputs(self, count: int) -> list[tuple[int, list[int]]]:
        """The next `count` tokens of each row that runs; guesses beyond them are dropped."""
        if not self.decoding:
            return [(self.rows[0], self.tokens[self.length : self.length + count])]
        del self.draft[count - 1 :]
        self.todo = count
        return [(self.rows[0], [self.tokens[-1], *self.draft])]

    def wrote(self, count: int) -> None:
        """Its next `count` tokens are in the pages now."""
        self.length += count
        self.todo -= count

    def accept(self, drawn: Sequence[Drawn]) -> bool:
        """Adds sampled tokens: one for the last token, then one for every guess that held.

        Tokens after one that ends the text are left out. Returns whether it has ended.
        """
        for one in drawn:
            piece = self._add(one)
            if piece.finish_reason is not None:
                self.handle.count_token()
                self._last = piece
                break
            self.handle.put(piece)
        self.decoding = True
        self.length = len(self.tokens) - 1
        self._guess()
        self.todo = 1 + len(self.draft)
        return self._last is not None

    def finish(self) -> None:
        """Hands the last piece and the whole text out."""
        assert self._last is not None, "a text that has not ended"
        reason = self._last.finish_reason
        assert reason is not None, "a last piece without a reason"
        self.handle.finish(self._last, lambda timing: (self._completion(reason, timing),))

    def cancel(self) -> None:
        """Ends it where it is."""
        self._last = Piece(text="", token=None, logprob=0.0, finish_reason="cancelled")
        self.finish()

    def _completion(self, reason: FinishReason, timing: Timing) -> Completion:
        return Completion(
            text="".join(self._text),
            tokens=tuple(one.token for one in self._drawn),
            logprobs=tuple(one.logprob for one in self._drawn),
            top_logprobs=tuple(one.top for one in self._drawn if one.top),
            finish_reason=reason,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=self.handle.cached_tokens,
            timing=timing,
        )

    def _guess(self) -> None:
        most = min(self.request.params.prompt_lookup, self.limit - len(self.tokens))
        self.draft = draft(self.tokens, most) if most > 0 else []

    def _add(self, drawn: Drawn) -> Piece:
        self.tokens.append(drawn.token)
        self._drawn.append(drawn)
        text, reason = self._show(drawn.token)
        self._text.append(text)
        return Piece(
            text=text,
            token=drawn.token,
            logprob=drawn.logprob,
            top_logprobs=drawn.top,
            finish_reason=reason,
        )

    def _show(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that a new token makes certain, and whether it ends the text."""
        reason: FinishReason | None = None
        text = ""
        if token in self.request.stop_tokens:
            reason = "stop"
        else:
            text, stopped = self._scan(self._decoder.push(token) if self._decoder else "")
            if stopped:
                return text, "stop"
            if len(self._drawn) >= self.request.limit:
                reason = "length"
        if reason is not None:
            held, stopped = self._scan(self._decoder.flush() if self._decoder else "")
            text += held
            if stopped:
                reason = "stop"
            else:
                text += self._scanner.flush()
        return text, reason

    def _scan(self, text: str) -> tuple[str, bool]:
        return self._scanner.push(text) if text else ("", False)
