"""Runs the application over sockets until it is told to stop, and then stops with grace.

Knows signals and connections, not what is served.
"""

import asyncio
import math
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from moe_jax.server.service import Service

_AFTER_DRAIN = 5  # seconds for answers to be told, before uvicorn cancels what is left


class GracefulServer(uvicorn.Server):
    """Refuses new requests when it stops, and lets running ones finish up to a limit.

    SIGINT and SIGTERM stop it, and so does `should_exit = True`; a second SIGINT stops it at once.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, on_ready: Callable[[], None] | None = None
    ):
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, and says so."""
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Waits for running requests; those that are not done in time are told so."""
        service = self._service
        service.gate.closed = True
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(service.limits.drain_seconds, service.expired.set)
        try:
            await super().shutdown(sockets)
        finally:
            expiry.cancel()


def make_server(
    app: Starlette,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    on_ready: Callable[[], None] | None = None,
    **uvicorn_options: Any,
) -> GracefulServer:
    """A server for an application of `make_app`; `.run()` blocks until it is told to stop.

    Args:
      app: what to serve.
      host: the address to listen at; only this machine can reach the default.
      port: 0 takes a free one.
      on_ready: called once clients can connect.
      uvicorn_options: passed to `uvicorn.Config`, such as log_level.
    """
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=service.limits.connections,
        timeout_graceful_shutdown=math.ceil(service.limits.drain_seconds) + _AFTER_DRAIN,
        **uvicorn_options,
    )
    return GracefulServer(config, service, on_ready)
