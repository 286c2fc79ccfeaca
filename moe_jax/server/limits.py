"""How much one client, and all of them together, may ask of the server."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from moe_jax.server.errors import ApiError


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a server; ValueError names the one that is wrong.

    Attributes:
      body_bytes: the largest body of a request.
      body_seconds: how long a body may take to arrive.
      send_seconds: how long a client may leave an event of its stream unread.
      prompts: prompts in one request.
      samples: samples per prompt (`n`).
      sequences: sequences, running or waiting, of all requests together; above it a request is
        refused with 429.
      connections: open connections; above it, 503.
      chat_tokens: tokens that a chat answer may have where the request does not say.
      drain_seconds: how long running requests may go on after the server was told to stop.
      retry_seconds: when a refused client should come again.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    prompts: int = 64
    samples: int = 16
    sequences: int = 256
    connections: int = 1024
    chat_tokens: int = 512
    drain_seconds: float = 30.0
    retry_seconds: int = 1

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be a finite number above 0, got {value!r}")


class Gate:
    """Counts the sequences that are open, and refuses more than the limit."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._open = 0
        self.closed = False

    @contextlib.contextmanager
    def hold(self, sequences: int) -> Iterator[Callable[[], None]]:
        """Keeps places for this many sequences; they may be given back before the end.

        Raises ApiError: 503 once the gate is closed, 429 if there is no room now, 400 if there
        never will be.
        """
        limit = self._limits.sequences
        if sequences > limit:
            raise ApiError(
                400,
                f"this request asks for {sequences} sequences (prompts times n), and the server "
                f"runs {limit} at most; send several requests",
            )
        retry = {"retry-after": str(self._limits.retry_seconds)}
        if self.closed:
            raise shutting_down()
        if self._open + sequences > limit:
            raise ApiError(
                429,
                f"the server is full: {self._open} of {limit} sequences are running or waiting, "
                f"and this request asks for {sequences}; try again later",
                code="overloaded",
                headers=retry,
            )
        self._open += sequences
        with contextlib.ExitStack() as places:
            places.callback(self._give_back, sequences)
            yield places.close

    def _give_back(self, sequences: int) -> None:
        self._open -= sequences


def shutting_down() -> ApiError:
    """What a client is told that comes, or is still here, when the server stops."""
    return ApiError(
        503, "the server is shutting down; send the request to another", code="shutting_down"
    )
