"""Lets in who knows the key, and counts every answer.

ASGI middleware: knows paths and headers, not what is behind them.
"""

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_jax.server.errors import CLIENT_GONE, ApiError, error_response
from moe_jax.server.metrics import Metrics

OPEN_PATHS = frozenset({"/health"})  # for probes, which have no key


class RequireKey:
    """Refuses requests without `Authorization: Bearer KEY`, except for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, key: str):
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with 401."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._knows(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "this server needs an API key: send the header 'Authorization: Bearer KEY' with the "
            "key it was started with",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        # The time that == takes would tell how many of the first characters are right.
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"


class CountAnswers:
    """Counts answers by route and status; a client that left before its answer counts as 499."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]):
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and watches how it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Paths that do not exist are as many as clients invent; each would be kept forever.
        route = scope["path"] if scope["path"] in self._routes else "other"
        answered = False

        def count(status: int) -> None:
            nonlocal answered
            answered = True
            self._metrics.requests.labels(route, str(status)).inc()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not answered:
                count(500)  # starlette answers so, further out
            raise
        if not answered:
            count(CLIENT_GONE)
