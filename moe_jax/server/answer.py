"""Generates and sends one answer, whole or as a stream, for as long as somebody wants it."""

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Literal

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from moe_jax.engine.outputs import Completion, Piece
from moe_jax.server.errors import engine_failed, error_object
from moe_jax.server.events import ClientStalledError, EventSender
from moe_jax.server.forms import Form, usage
from moe_jax.server.limits import shutting_down
from moe_jax.server.options import Job
from moe_jax.server.service import Service


class Answer:
    """An ASGI response; its sequences are cancelled when the client goes or the server must."""

    def __init__(
        self, service: Service, form: Form, jobs: list[Job], *, stream: bool, with_usage: bool
    ):
        self._service = service
        self._form = form
        self._jobs = jobs
        self._stream = stream
        self._with_usage = with_usage
        self._arrival = time.perf_counter()
        self._release = lambda: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request.

        Raises ApiError before anything is sent: 429, 503, and 400 for what the engine refuses.
        """
        service = self._service
        sender = EventSender(send, service.limits.send_seconds)
        with service.gate.hold(sum(job.answers for job in self._jobs)) as release:
            self._release = release
            if self._stream:
                work = self._send_events(sender)
            else:
                work = self._send_whole(scope, receive, send)
            ended = await _until_gone(work, receive, service.expired)
        if ended == "expired":
            error = shutting_down()
            if not sender.started:
                raise error
            with contextlib.suppress(ClientStalledError):
                await sender.event(error_object(error))
                await sender.close()
        elif ended == "gone":
            service.metrics.vanished.inc()

    async def _send_events(self, sender: EventSender) -> None:
        try:
            await self._send_pieces(sender)
        except ClientStalledError:
            raise  # nobody reads what would be said
        except Exception as error:
            if sender.started:
                await sender.event(error_object(engine_failed(error)))
                await sender.close()
            raise

    async def _send_pieces(self, sender: EventSender) -> None:
        form, jobs = self._form, self._jobs
        offsets = [0] * len(jobs)
        done: dict[int, list[Completion]] = {}
        unused = {"usage": None} if self._with_usage else {}
        async with aclosing(self._service.pieces(jobs)) as pieces:
            async for place, piece in pieces:
                if not sender.started:
                    self._first_token()
                    for job in jobs:
                        opening = form.opening(job.choice)
                        if opening is not None:
                            await sender.event(form.stream_head | {"choices": [opening]} | unused)
                part = form.part(jobs[place].choice, piece, offsets[place])
                offsets[place] += len(piece.text)
                if piece.completion is not None:
                    done[place] = [piece.completion]
                if part is not None:
                    await sender.event(form.stream_head | {"choices": [part]} | unused)
        self._generated()
        if self._with_usage:
            await sender.event(form.stream_head | {"choices": [], "usage": usage(jobs, done)})
        await sender.end()

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        form, jobs = self._form, self._jobs
        choices = []
        if jobs[0].answers > 1 or jobs[0].options.get("num_beams", 1) > 1:
            results = await self._service.finished(jobs)
            done = dict(enumerate(results))
            for job, answers in zip(jobs, results, strict=True):
                for rank, one in enumerate(answers):
                    index = job.choice + rank
                    choices.append(form.choice(index, one.text, one.finish_reason, ()))
        else:
            done = {}
            collected: list[list[Piece]] = [[] for _ in jobs]
            async with aclosing(self._service.pieces(jobs)) as pieces:
                async for place, piece in pieces:
                    if not any(collected):
                        self._first_token()
                    collected[place].append(piece)
                    if piece.completion is not None:
                        done[place] = [piece.completion]
            for place, job in enumerate(jobs):
                (one,) = done[place]
                choices.append(
                    form.choice(job.choice, one.text, one.finish_reason, collected[place])
                )
        self._generated()
        body = form.head | {"choices": choices, "usage": usage(jobs, done)}
        await JSONResponse(body)(scope, receive, send)

    def _first_token(self) -> None:
        self._service.metrics.first_token.observe(time.perf_counter() - self._arrival)

    def _generated(self) -> None:
        """Before the end is sent: whoever has read it finds its places free."""
        self._service.metrics.latency.observe(time.perf_counter() - self._arrival)
        self._release()


async def _until_gone(
    work: Coroutine[None, None, None], receive: Receive, expired: asyncio.Event
) -> Literal["done", "gone", "expired"]:
    """Does the work; cancels it, and waits for that, when the client leaves or time is over."""
    tasks = [asyncio.create_task(one) for one in (work, _gone(receive), expired.wait())]
    worker, left, _ = tasks
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = "done" if worker.done() else "gone" if left.done() else "expired"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    try:
        if ended == "done":
            worker.result()
    except ClientStalledError:
        ended = "gone"
    return ended


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
