"""Decides which requests run in the next step, and with how many new tokens each.

Knows counts of tokens, rows and pages; no arrays, no text, and not how a step is run.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from moe_jax.cache.paged_kv import PAGE_SIZE, pages_for


@dataclass(eq=False, kw_only=True)
class Job:
    """A request as the scheduler sees it.

    Attributes:
      prompt: tokens to compute before it is sampled from first; grows if it is restarted.
      limit: tokens that each of its rows may come to hold.
      arrival: its place in the order of submission, known when it is queued.
      priority: higher runs first.
      seats: rows of the page pool that it holds while it runs: one, or one for each beam.
      restartable: whether it may lose its pages and be computed again.
      length: tokens in the pages of each of its rows.
      todo: new tokens of each row until something can be sampled.
      ahead: tokens that a step writes behind those, which was started before they were known.
      decoding: whether it was sampled from since it was last started.
      restarts: how often it lost its pages.
      held: pages of its rows together, where they may share some; None: it has one row.
    """

    prompt: int
    limit: int
    arrival: int = 0
    priority: int = 0
    seats: int = 1
    restartable: bool = True
    length: int = 0
    todo: int = field(init=False)
    ahead: int = 0
    decoding: bool = False
    restarts: int = 0
    held: int | None = None

    def __post_init__(self):
        self.todo = self.prompt

    @property
    def active(self) -> int:
        """Rows that run in its next step: a prompt is computed once, for all beams."""
        return self.seats if self.decoding else 1

    def pages_at(self, tokens: int) -> int:
        """Pages it holds at most with this many tokens in each active row.

        Beams share the full pages of the prompt, and perhaps others.
        """
        common = self.prompt // PAGE_SIZE if self.active > 1 else 0
        return common + self.active * (pages_for(tokens) - common)

    @property
    def most_pages(self) -> int:
        """Pages it holds at most when it has come to its limit."""
        common = self.prompt // PAGE_SIZE
        return common + self.seats * (pages_for(self.limit) - common)

    def new_pages(self, count: int) -> int:
        """Pages that `count` more tokens on each active row may need."""
        held = pages_for(self.length) if self.held is None else self.held
        return self.pages_at(self.length + count) - held


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True)
class Admission(Generic[AnyJob]):
    """A request that may start now, after these were stopped for it."""

    job: AnyJob
    stopped: tuple[AnyJob, ...]


@dataclass(frozen=True)
class Step(Generic[AnyJob]):
    """The requests of the next step with their tokens; or what must be stopped first."""

    run: tuple[tuple[AnyJob, int], ...] = ()
    stop: AnyJob | None = None


class Scheduler(Generic[AnyJob]):
    """Continuous batching: running requests decode together, prompts fill the rest of a step.

    Requests start by priority, then in the order of their arrival; nobody overtakes. One starts
    when, were every request to run to its limit, the pages would still suffice at every moment to
    come (the future peak of LightLLM, arXiv:2507.10150). With `expected_share` below 1 requests
    are taken to end earlier: more run together, and when pages do run out the last of them is
    stopped and computed again later.
    """

    def __init__(self, *, rows: int, pages: int, budget: int, expected_share: float = 1.0):
        self.running: list[AnyJob] = []
        self.waiting: list[AnyJob] = []
        self._rows = rows
        self._pages = pages
        self._budget = budget
        self._expected_share = expected_share

    def add(self, job: AnyJob) -> None:
        """Queues a request."""
        bisect.insort(self.waiting, job, key=_order)

    def remove(self, job: AnyJob) -> None:
        """Forgets a request that has ended."""
        (self.running if job in self.running else self.waiting).remove(job)

    def restart(self, job: AnyJob) -> None:
        """Puts a running request back to where it waited."""
        self.running.remove(job)
        job.restarts += 1
        self.add(job)

    def admit(self) -> Admission[AnyJob] | None:
        """`next_admission`, carried out: the request runs, and those that make room wait again.

        The caller stops these, starts the request, and asks again.
        """
        admission = self.next_admission()
        if admission is not None:
            for one in admission.stopped:
                self.restart(one)
            self.waiting.remove(admission.job)
            bisect.insort(self.running, admission.job, key=_order)
        return admission

    def next_admission(self) -> Admission[AnyJob] | None:
        """The first waiting request, if it can run beside the others.

        Restartable requests of lower priority make room for it.
        """
        if not self.waiting:
            return None
        job, stopped = self.waiting[0], []
        staying = list(self.running)
        while not self._fits(staying, job):
            lower = [one for one in staying if one.priority < job.priority and one.restartable]
            if not lower:
                return None
            stopped.append(max(lower, key=_order))
            staying.remove(stopped[-1])
        return Admission(job, tuple(stopped))

    def step(self, free_pages: int) -> Step[AnyJob]:
        """Every decoding request, and chunks of prompts in what is left of the step's tokens.

        Where the pages do not suffice, names the request to stop; the caller stops it and asks
        again.
        """
        run: list[tuple[AnyJob, int]] = []
        left = self._budget - sum(job.active for job in self.running if job.decoding)
        for job in self.running:
            if job.decoding:
                guesses = min(job.todo - 1, left)
                run.append((job, 1 + guesses))
                left -= guesses
        for job in self.running:
            if not job.decoding and left > 0:
                run.append((job, min(job.todo, left)))
                left -= run[-1][1]
        if sum(job.new_pages(count) for job, count in run) <= free_pages:
            return Step(run=tuple(run))
        last = next((job for job in reversed(self.running) if job.restartable), None)
        if last is None:
            raise RuntimeError(f"{free_pages} free pages do not suffice for requests that must run")
        self.restart(last)
        return Step(stop=last)

    def _fits(self, running: Sequence[Job], job: AnyJob) -> bool:
        together = (*running, job)
        if sum(one.seats for one in together) > self._rows:
            return False
        return not running or self._future_peak(together) <= self._pages

    def _future_peak(self, jobs: Sequence[Job]) -> int:
        """The most pages held at once if all requests run to their limits.

        Each is taken to grow by a token per step from now on, and to end as late as the prompts
        before its own can make it: never less than it will hold, never shorter than it will.
        """
        fixed = sum(job.most_pages for job in jobs if not job.restartable)
        decoding = sum(job.seats for job in jobs)
        now, left, waits, unread = [], [], [], 0
        for job in sorted(jobs, key=_order):
            unread += 0 if job.decoding else job.todo
            if job.restartable:
                share = 1.0 if job.restarts else self._expected_share
                now.append(max(job.length, job.prompt))
                left.append(math.ceil((job.limit - now[-1]) * share))
                waits.append(0 if job.decoding else -(-unread // max(1, self._budget - decoding)))
        if not now:
            return fixed
        ends = np.array(left) + np.array(waits)
        moments = np.unique(ends)
        tokens = np.array(now) + np.minimum(left, moments[:, None])
        pages = np.where(ends >= moments[:, None], -(-tokens // PAGE_SIZE), 0)
        return fixed + int(pages.sum(axis=1).max())


def _order(job: AnyJob) -> tuple[int, int]:
    return -job.priority, job.arrival
