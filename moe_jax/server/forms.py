"""The shape of an answer: what both kinds share, and what each must say itself."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from moe_jax.engine.outputs import Completion, Piece
from moe_jax.server.options import Job


@runtime_checkable
class Form(Protocol):
    """How pieces and finished sequences become the JSON of one kind of answer."""

    @property
    def head(self) -> dict[str, Any]:
        """Fields of the answer that is sent whole."""

    @property
    def stream_head(self) -> dict[str, Any]:
        """Fields of every event of a stream."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first text, if anything."""

    def part(self, index: int, piece: Piece, offset: int) -> dict[str, Any] | None:
        """What a stream says of a piece; None if there is nothing to say yet.

        `offset` counts the characters of its choice before it.
        """

    def choice(self, index: int, text: str, reason: str, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole choice."""


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields with which every answer begins."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def usage(jobs: Sequence[Job], done: Mapping[int, Sequence[Completion]]) -> dict[str, Any]:
    """Tokens read and written; a prompt counts once, however many samples it has.

    Args:
      jobs: of the request.
      done: the answers of each job, by its place in `jobs`.
    """
    prompts = [done[index][0] for index, job in enumerate(jobs) if job.first]
    prompt_tokens = sum(one.prompt_tokens for one in prompts)
    generated = sum(len(one.tokens) for answers in done.values() for one in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
    }
