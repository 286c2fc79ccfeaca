"""/v1/completions: texts or token ids in, their continuations out."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from moe_jax.engine.outputs import Piece
from moe_jax.server.answer import Answer
from moe_jax.server.body import read_json
from moe_jax.server.chosen import completion_logprobs
from moe_jax.server.face import TokenText
from moe_jax.server.forms import head
from moe_jax.server.options import make_jobs
from moe_jax.server.protocol import read_completion_request
from moe_jax.server.service import Service

_MAX_TOKENS = 16  # OpenAI's default for this route


class CompletionForm:
    """The JSON of a continuation."""

    def __init__(self, model: str, tokenizer: TokenText | None, logprobs: bool):
        self.head: dict[str, Any] = head("cmpl", "text_completion", model)
        self.stream_head = self.head
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """Nothing: a continuation begins with its text."""
        return None

    def part(self, index: int, piece: Piece, offset: int) -> dict[str, Any] | None:
        """A choice that has only what the piece adds."""
        if not piece.text and piece.finish_reason is None and not self._logprobs:
            return None
        return self._choice(index, piece.text, piece.finish_reason, [piece], offset)

    def choice(self, index: int, text: str, reason: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole choice."""
        return self._choice(index, text, reason, pieces, 0)

    def _choice(
        self, index: int, text: str, reason: str | None, pieces: Sequence[Piece], offset: int
    ) -> dict[str, Any]:
        logprobs = completion_logprobs(self._tokenizer, pieces, offset) if self._logprobs else None
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


async def completions(request: Request) -> ASGIApp:
    """Answers POST /v1/completions."""
    service: Service = request.app.state.service
    asked = read_completion_request(await read_json(request, service.limits))
    service.check_model(asked.model)
    jobs = make_jobs(
        asked,
        asked.prompt,
        limits=service.limits,
        max_tokens=_MAX_TOKENS if asked.max_tokens is None else asked.max_tokens,
        top_logprobs=asked.logprobs,
    )
    form = CompletionForm(service.model, service.engine.tokenizer, asked.logprobs is not None)
    return Answer(service, form, jobs, stream=bool(asked.stream), with_usage=asked.wants_usage())
