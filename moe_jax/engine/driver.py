"""Runs an engine's steps in a thread of its own, for those who wait in an event loop.

Knows requests, handles and threads; not what a step does.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator

from moe_jax.engine.handle import Handle
from moe_jax.engine.loop import EngineLoop
from moe_jax.engine.outputs import Completion, Piece
from moe_jax.engine.request import Request


class Driver:
    """A thread that steps as long as there is something to run, and starts whenever there is."""

    def __init__(self, loop: EngineLoop):
        self._loop = loop
        self._lock = threading.Lock()
        self._wanted = False
        self._thread: threading.Thread | None = None

    async def pieces(self, request: Request) -> AsyncGenerator[Piece, None]:
        """Submits a request and yields what each step adds to it; closing the generator cancels it.

        A generator that is never started submits nothing.
        """
        handle = self._loop.submit(request)
        news = self._listen(handle)
        try:
            while True:
                news.clear()
                done = handle.done
                while (piece := handle.take_piece()) is not None:
                    yield piece
                if done:
                    return
                await news.wait()
        finally:
            handle.cancel()

    async def result(self, request: Request) -> Completion | list[Completion]:
        """Submits a request and waits for its end; it is cancelled if the waiting is."""
        handle = self._loop.submit(request)
        news = self._listen(handle)
        try:
            while not handle.done:
                news.clear()
                if not handle.done:
                    await news.wait()
            return handle.result()
        finally:
            handle.cancel()

    def _listen(self, handle: Handle) -> asyncio.Event:
        """An event that is set whenever there is something new; sees to it that steps run."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            # A closed event loop has nobody left to tell; the request is cancelled soon.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(news.set)

        handle.notify(tell)
        with self._lock:
            self._wanted = True
            if self._thread is None:
                # A daemon: a request that nobody waits for does not keep Python alive.
                self._thread = threading.Thread(target=self._run, name="moe_jax", daemon=True)
                self._thread.start()
        return news

    def _run(self) -> None:
        """Runs steps until there is nothing to run; the thread ends then, and frees the engine."""
        while True:
            while self._loop.step():
                pass
            with self._lock:
                if not self._wanted:
                    self._thread = None
                    return
                self._wanted = False
