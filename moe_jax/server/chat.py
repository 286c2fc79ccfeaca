"""/v1/chat/completions: messages in, the assistant's next message out."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from moe_jax.engine.outputs import Piece
from moe_jax.server.answer import Answer
from moe_jax.server.body import read_json
from moe_jax.server.chosen import chat_logprobs
from moe_jax.server.errors import ApiError
from moe_jax.server.face import TokenText
from moe_jax.server.forms import head
from moe_jax.server.options import make_jobs
from moe_jax.server.protocol import ChatRequest, read_chat_request
from moe_jax.server.service import Service


class ChatForm:
    """The JSON of a message."""

    def __init__(self, model: str, tokenizer: TokenText | None, logprobs: bool):
        self.head: dict[str, Any] = head("chatcmpl", "chat.completion", model)
        self.stream_head = self.head | {"object": "chat.completion.chunk"}
        self._tokenizer = tokenizer
        self._logprobs = logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        """Whose message it is."""
        return self._delta(index, {"role": "assistant", "content": ""}, None, None)

    def part(self, index: int, piece: Piece, offset: int) -> dict[str, Any] | None:
        """What the piece adds to the message."""
        if not piece.text and piece.finish_reason is None and not self._logprobs:
            return None
        delta = {"content": piece.text} if piece.text else {}
        return self._delta(index, delta, piece.finish_reason, self._chosen([piece]))

    def choice(self, index: int, text: str, reason: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole message."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": reason,
            "logprobs": self._chosen(pieces),
        }

    def _chosen(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, pieces) if self._logprobs else None

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None, chosen: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": reason, "logprobs": chosen}


async def chat(request: Request) -> ASGIApp:
    """Answers POST /v1/chat/completions."""
    service: Service = request.app.state.service
    asked = read_chat_request(await read_json(request, service.limits))
    service.check_model(asked.model)
    messages = [message.plain() for message in asked.messages]
    jobs = make_jobs(
        asked,
        [messages],
        limits=service.limits,
        max_tokens=_max_tokens(asked, service.limits.chat_tokens),
        top_logprobs=_top_logprobs(asked),
    )
    form = ChatForm(service.model, service.engine.tokenizer, bool(asked.logprobs))
    return Answer(service, form, jobs, stream=bool(asked.stream), with_usage=asked.wants_usage())


def _max_tokens(asked: ChatRequest, default: int) -> int:
    given = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(given) > 1:
        raise ApiError(
            400,
            f"max_tokens is {asked.max_tokens} and max_completion_tokens is "
            f"{asked.max_completion_tokens}; they mean the same: give one of them",
            param="max_tokens",
        )
    return default if not given else next(number for number in given if number is not None)


def _top_logprobs(asked: ChatRequest) -> int | None:
    if asked.logprobs:
        return asked.top_logprobs or 0
    if asked.top_logprobs is not None:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return None
