"""Who runs, and on which pages: carries out on the KV rows what the scheduler decides.

Knows no threads, no model and no sampling.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from moe_jax.cache.kv_rows import KvRows
from moe_jax.cache.page_pool import PageCopies
from moe_jax.cache.paged_kv import pages_for
from moe_jax.engine.batch import PREFILL_BUCKETS, NewTokens
from moe_jax.engine.beam_group import BeamGroup
from moe_jax.engine.continuation import Continuation
from moe_jax.engine.scheduler import Scheduler

Running = Continuation | BeamGroup
# The new tokens of one row in a step.
Input = tuple[Running, int, list[int]]


@dataclass(frozen=True)
class Room:
    """Pages for the new tokens of a step.

    Attributes:
      copies: pages that must be copied first, if any.
      batch: the step's batch.
      wanted: the places in its tokens, laid end to end, after which logits are wanted.
      places: which of those logits belong to which request.
    """

    copies: PageCopies | None
    batch: list[NewTokens]
    wanted: list[int]
    places: dict[Running, list[int]]


class Seating:
    """The requests of one engine from when they are queued until they have ended.

    Attributes:
      cached_tokens: tokens of prompts that were not computed, because earlier requests had.
      restarts: how often a request lost its pages to another.
    """

    def __init__(self, *, pages: int, rows: int, expected_share: float, identity: bytes | None):
        self.cached_tokens = 0
        self.restarts = 0
        self._rows = rows
        self._expected_share = expected_share
        # One row more than requests may use, for what is computed beside them.
        self._kv = KvRows(pages, rows + 1, identity)
        self._jobs: dict[Running, None] = {}
        self._scheduler = self._empty_scheduler()

    @property
    def running(self) -> int:
        """Requests that have rows."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._scheduler.waiting)

    @property
    def available_pages(self) -> int:
        """Pages that nobody uses, those kept for later requests included."""
        return self._kv.available

    @property
    def pages(self) -> int:
        """All pages."""
        return self._kv.pages

    @property
    def jobs(self) -> tuple[Running, ...]:
        """All requests that have not ended."""
        return tuple(self._jobs)

    def violations(self) -> list[str]:
        """What is wrong; nothing, ever."""
        return self._kv.violations()

    def add(self, job: Running) -> None:
        """Queues a request."""
        self._jobs[job] = None
        self._scheduler.add(job)

    def leave(self, job: Running) -> None:
        """Ends a request; its pages are free, or kept for those that begin alike."""
        del self._jobs[job]
        self._scheduler.remove(job)
        self._kv.give_back(job.rows, job.prefix)

    def schedule(self) -> tuple[tuple[Running, int], ...]:
        """Starts and stops requests; returns those of the next step with their tokens."""
        while (admission := self._scheduler.admit()) is not None:
            for job in admission.stopped:
                self._stop(job)
            job = admission.job
            rows = self._kv.take(job.seats)
            cached = self._kv.share(rows[0], job.prefix, job.tokens)
            self.cached_tokens += 0 if job.restarts else cached
            job.begin(rows, cached)
        while True:
            step = self._scheduler.step(self._kv.available)
            if step.stop is None:
                return step.run
            self._stop(step.stop)

    def make_room(self, inputs: Sequence[Input]) -> Room:
        """Gives every row pages for its new tokens."""
        copies = self._kv.grow({row: len(new) for _, row, new in inputs})
        tables = self._kv.tables
        batch: list[NewTokens] = []
        wanted: list[int] = []
        places: dict[Running, list[int]] = {}
        end = 0
        for job, row, new in inputs:
            verify = job.decoding and len(new) > 1
            length = job.length + job.todo
            batch.append(NewTokens(new, job.length, length, tables[row], verify=verify))
            end += len(new)
            if len(new) == job.todo:
                own = range(end - len(new) if verify else end - 1, end)
                places.setdefault(job, []).extend(range(len(wanted), len(wanted) + len(own)))
                wanted += own
        return Room(copies, batch, wanted, places)

    def make_room_ahead(self, jobs: Sequence[Running]) -> Room | None:
        """Gives these pages for one more token each, which nobody knows yet, before they `settle`.

        None where there are not enough, or another request can start.
        """
        if sum(job.new_pages(1) for job in jobs) > self.available_pages:
            return None
        if self._scheduler.next_admission() is not None:
            return None
        for job in jobs:
            job.todo = job.ahead = 1
        return self.make_room([(job, job.rows[0], [0]) for job in jobs])

    def settle(self, jobs: Iterable[Running]) -> None:
        """After a step: drops guesses that did not hold, lists full pages, moves beams."""
        remaining = [job for job in jobs if job in self._jobs]
        texts = [job for job in remaining if isinstance(job, Continuation)]
        self._kv.shorten({job.rows[0]: job.length + job.ahead for job in texts})
        self._kv.list_pages(
            [
                (job.rows[0], job.prefix, job.tokens, min(job.length, len(job.tokens)))
                for job in remaining
            ]
        )
        groups = [job for job in remaining if isinstance(job, BeamGroup)]
        if any(job.parent for job in groups):
            self._kv.fork({row: one for job in groups for row, one in job.parent.items()})
        for job in groups:
            job.held = self._kv.held(job.rows)

    def start_over(self) -> list[Running]:
        """Everybody waits again, for what the pages held is lost.

        Returns those that cannot go on, because computing again would give them other numbers; they
        have ended.
        """
        self._kv.clear()
        self._scheduler = self._empty_scheduler()
        lost: list[Running] = []
        for job in self.jobs:
            began = bool(job.rows)
            job.stop()
            if began and isinstance(job, Continuation) and not job.restartable:
                del self._jobs[job]
                lost.append(job)
            else:
                self._scheduler.add(job)
        return lost

    @contextmanager
    def borrow_pages(self, tokens: int) -> Iterator[Int[np.ndarray, " pages_per_seq"]]:
        """A row of the block table with room for this many tokens, for use between steps.

        Requests may lose their pages to it and compute them again; searches begin anew, and last.

        Raises RuntimeError if those that can do neither hold too many pages.
        """
        while self._kv.available < pages_for(tokens):
            running = self._scheduler.running
            free = [job for job in running if job.restartable or isinstance(job, BeamGroup)]
            if not free:
                raise RuntimeError(
                    f"{pages_for(tokens)} KV pages are needed, {self._kv.available} are free, and "
                    f"the requests that hold the others cannot give them up: their rotary "
                    "frequencies follow the length; let them end first"
                )
            last = max(free, key=lambda job: (job.restartable, job.arrival))
            self._scheduler.restart(last)
            self._stop(last)
        (row,) = self._kv.take(1)
        try:
            self._kv.grow({row: tokens})
            yield self._kv.tables[row]
        finally:
            self._kv.give_back([row])

    def _stop(self, job: Running) -> None:
        self.restarts += 1
        self._kv.give_back(job.rows, job.prefix)
        job.stop()

    def _empty_scheduler(self) -> Scheduler[Running]:
        return Scheduler(
            rows=self._rows,
            pages=self._kv.pages,
            budget=PREFILL_BUCKETS[-1],
            expected_share=self._expected_share,
        )
