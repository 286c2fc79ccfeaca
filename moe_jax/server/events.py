"""Server-sent events: how a stream of JSON objects goes over a connection.

Knows nothing of what the objects say.
"""

import asyncio
import json

from starlette.types import Send

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class ClientStalledError(Exception):
    """A client reads nothing of what it asked for."""


class EventSender:
    """Sends events to one client; its answer starts with the first, so that errors before it show.

    Every method raises ClientStalledError if the client reads nothing for `seconds`.
    """

    def __init__(self, send: Send, seconds: float):
        self._send = send
        self._seconds = seconds
        self.started = False

    async def event(self, value: object) -> None:
        """Sends one JSON object."""
        # Without ensure_ascii, characters that some clients take for line ends would go through.
        await self._data(json.dumps(value, separators=(",", ":"), allow_nan=False))

    async def end(self) -> None:
        """Says that the stream is complete, and ends the answer."""
        await self._data("[DONE]")
        await self.close()

    async def close(self) -> None:
        """Ends the answer."""
        await self._message({"type": "http.response.body", "body": b"", "more_body": False})

    async def _data(self, text: str) -> None:
        if not self.started:
            self.started = True
            await self._message({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        body = f"data: {text}\n\n".encode()
        await self._message({"type": "http.response.body", "body": body, "more_body": True})

    async def _message(self, message: dict) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await self._send(message)
        except TimeoutError as error:
            raise ClientStalledError from error
