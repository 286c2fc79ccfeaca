"""What the routes of one server share: its engine, limits and counters, and whether it is well."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager

from moe_jax.engine.outputs import Completion, Piece
from moe_jax.server.errors import ApiError
from moe_jax.server.face import ServedEngine
from moe_jax.server.limits import Gate, Limits
from moe_jax.server.merge import merge
from moe_jax.server.metrics import Metrics
from moe_jax.server.options import Job


class Service:
    """One engine behind a server.

    Attributes:
      engine: what generates.
      model: the name by which clients ask for it.
      created: when the server was made, in seconds since 1970.
      limits: what clients may ask for.
      gate: counts open sequences.
      metrics: counts everything else.
      expired: set when the time is over in which running requests may still finish.
      failure: the engine's last error; None once something succeeded after it.
    """

    def __init__(self, engine: ServedEngine, model: str, limits: Limits):
        self.engine = engine
        self.model = model
        self.created = int(time.time())
        self.limits = limits
        self.gate = Gate(limits)
        self.metrics = Metrics()
        self.expired = asyncio.Event()
        self.failure: str | None = None

    def check_model(self, name: str) -> None:
        """Raises ApiError (404) if this is not the model that is served here."""
        if name != self.model:
            raise ApiError(
                404,
                f"there is no model {name!r} here; this server has {self.model!r}",
                param="model",
                code="model_not_found",
            )

    async def pieces(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all sequences as they come, each with the place of its job in `jobs`.

        Closing it, or being cancelled in it, cancels every sequence.

        Raises ApiError (400) for what the engine refuses, before the first piece.
        """
        try:
            async with aclosing(merge([self._pieces(job) for job in jobs])) as merged:
                async for index, piece in merged:
                    if piece.finish_reason == "cancelled":
                        raise RuntimeError("the engine cancelled a request that a client waits for")
                    self.failure = None
                    self.metrics.generated_tokens.inc()
                    if piece.completion is not None:
                        self._count_prompt(piece.completion)
                    yield index, piece
        except ApiError:
            raise
        except Exception as error:
            self._failed(error)
            raise

    async def finished(self, jobs: Sequence[Job]) -> list[list[Completion]]:
        """The answers of each job, best first, for jobs that have nothing to show before.

        Raises ApiError (400) for what the engine refuses.
        """
        tasks = [asyncio.create_task(self._finished(job)) for job in jobs]
        try:
            answers = await asyncio.gather(*tasks)
        except ApiError:
            raise
        except Exception as error:
            self._failed(error)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.failure = None
        for several in answers:
            self._count_prompt(several[0])
            self.metrics.generated_tokens.inc(sum(len(one.tokens) for one in several))
        return answers

    async def _pieces(self, job: Job) -> AsyncGenerator[Piece, None]:
        with _refusals():
            pieces = self.engine.astream(job.prompt, **job.options)
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    async def _finished(self, job: Job) -> list[Completion]:
        with _refusals():
            call = self.engine.agenerate(job.prompt, **job.options)
        result = await call
        return result if isinstance(result, list) else [result]

    def _count_prompt(self, completion: Completion) -> None:
        self.metrics.prompt_tokens.inc(completion.prompt_tokens)
        self.metrics.cached_tokens.inc(completion.cached_tokens)

    def _failed(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"


@contextmanager
def _refusals() -> Iterator[None]:
    """What the engine does not take is the client's error; what happens later is not."""
    try:
        yield
    except ValueError as error:
        raise ApiError(400, str(error)) from error
