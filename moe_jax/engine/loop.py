"""The engine's loop: runs steps of the requests there are, for whoever waits for one.

Knows threads, errors and interrupts; who runs is the business of the seating, what is drawn that of
the sampler.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from host_offload.interrupts import hold_interrupts
from moe_jax.decoding.beam_search import Candidates
from moe_jax.engine.beam_group import BeamGroup, search
from moe_jax.engine.continuation import Continuation, Drawn
from moe_jax.engine.flight import Flight, StepClock, take_off
from moe_jax.engine.handle import Handle
from moe_jax.engine.monitor import StepTime
from moe_jax.engine.observer import StepObserver
from moe_jax.engine.request import Request
from moe_jax.engine.runner import Runner
from moe_jax.engine.sampler import Draw, Sampler
from moe_jax.engine.seating import Running, Seating


@dataclass(frozen=True)
class Load:
    """How busy an engine is.

    Attributes:
      running, waiting: requests.
      free_pages: KV pages that nobody uses, those kept for later requests included.
      pages: all KV pages.
    """

    running: int
    waiting: int
    free_pages: int
    pages: int


class EngineLoop:
    """Runs the requests of one runner. Every method may be called from any thread.

    One step runs at a time, in the thread of somebody who waits for its result.
    """

    def __init__(
        self,
        runner: Runner,
        seating: Seating,
        sampler: Sampler,
        observer: StepObserver,
        *,
        look_ahead: bool,
    ):
        """With `look_ahead`, a step is started before the last one's tokens are read, if it can be.

        That pays where starting a step does not wait for it.
        """
        self.runner = runner
        self.seating = seating
        self._sampler = sampler
        self._observer = observer
        self._handles: dict[Handle, Running] = {}
        self._look_ahead = look_ahead
        self._stepping: tuple[Running, ...] = ()
        self._ahead: Flight | None = None
        self._clock = StepClock()
        runner.before_program = self._clock.give_way
        # Filled by any thread at any time, emptied by the one that runs steps.
        self._submitted: deque[Running] = deque()
        self._cancelled: deque[Handle] = deque()
        self._arrivals = 0
        self._lock = threading.Lock()

    def submit(self, request: Request) -> Handle:
        """Queues a request; never waits for a step."""
        handle = Handle(self.advance, self._cancel, len(request.prompt))
        kind = BeamGroup if request.params.num_beams > 1 else Continuation
        self._submitted.append(kind(request, handle, exact_again=self._exact_again(request)))
        return handle

    def step(self) -> bool:
        """Runs one step of what there is to run; False if there is nothing.

        An error in a step ends the requests that were in it, and reaches those who hold them; the
        others go on. An interrupt ends none, and is raised.
        """
        with self.paused():
            return self._guarded_step()

    def advance(self, ready: Callable[[], bool]) -> None:
        """Runs one step, unless another thread's has brought about what is waited for."""
        with self.paused():
            if not ready() and not self._guarded_step() and not ready():
                raise RuntimeError("somebody waits for a step, and there is nothing to run; a bug")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Between two steps; no other runs meanwhile."""
        try:
            with self._lock:
                yield
        finally:
            self._sweep()

    @property
    def load(self) -> Load:
        """How busy the engine is; never waits for a step."""
        s = self.seating
        return Load(s.running, s.waiting + len(self._submitted), s.available_pages, s.pages)

    def violations(self) -> list[str]:
        """What is wrong with the bookkeeping of the KV cache; nothing, ever."""
        with self.paused():
            return self.seating.violations()

    @contextmanager
    def borrow_pages(self, tokens: int) -> Iterator[Int[np.ndarray, " pages_per_seq"]]:
        """A row of the block table with room for this many tokens; no step runs meanwhile.

        Requests may lose their pages to it, and compute them again afterwards.
        """
        with self.paused():
            self._mend()
            with self.seating.borrow_pages(tokens) as pages:
                yield pages
            self._observer.after_other()

    def _queue_submitted(self) -> None:
        while self._submitted:
            job = self._submitted.popleft()
            self._arrivals += 1
            job.arrival = self._arrivals
            self._handles[job.handle] = job
            self.seating.add(job)

    def _exact_again(self, request: Request) -> bool:
        """Whether its keys are the same if they are computed again, or by another request.

        Where rotary frequencies follow the length they are not, beyond the trained length.
        """
        rope = self.runner.model.config.rope
        longest = len(request.prompt) + request.limit
        follows = rope.kind in ("dynamic", "longrope")
        return not follows or longest <= (rope.original_max_positions or 0)

    def _cancel(self, handle: Handle) -> None:
        self._cancelled.append(handle)
        self._sweep()

    def _sweep(self) -> None:
        """Ends what was cancelled, unless a step runs: its thread does so after the step."""
        while self._cancelled and self._lock.acquire(blocking=False):
            try:
                with hold_interrupts():
                    self._drop_cancelled()
            finally:
                self._lock.release()

    def _drop_cancelled(self) -> None:
        if self._cancelled:
            self._queue_submitted()
        while self._cancelled:
            handle = self._cancelled.popleft()
            if handle in self._handles:
                self._end(self._handles[handle]).cancel()

    def _guarded_step(self) -> bool:
        self._stepping = ()
        try:
            return self._step()
        except Exception as error:
            with hold_interrupts():
                for job in self._stepping or self.seating.jobs:
                    if job.handle in self._handles:  # it did not end in this very step
                        self._end(job).handle.fail(error)
                self._start_over()
            return True
        except BaseException:
            with hold_interrupts():
                self._start_over()
            raise

    def _step(self) -> bool:
        with hold_interrupts():
            self._queue_submitted()
            self._drop_cancelled()
            flight = self._take_ahead()
        self._clock.start(ahead=flight is not None, done=flight is not None and flight.done)
        flight = flight or self._begin()
        if flight is None:
            return False
        texts = {job: own for job, own in flight.places.items() if isinstance(job, Continuation)}
        groups = {job: own for job, own in flight.places.items() if isinstance(job, BeamGroup)}
        draw = self._sampler.sample(texts, flight.logits) if texts else None
        candidates = search(groups, flight.logits) if groups else {}
        with hold_interrupts():
            for job, count in flight.run:
                job.wrote(count)
            sampled = sum(job.seats for job in groups)
        if draw is not None:
            # Starting the next step may take longer than this one still does.
            self._clock.watch(lambda: draw.done)
            self._ahead = self._begin_ahead(flight, draw)
            self._clock.look()
        self._observer.catch_up()  # while the device works
        drawn = self._sampler.read(draw) if draw is not None else {}
        with hold_interrupts():
            sampled += sum(len(found) for found in drawn.values() if isinstance(found, list))
            ended = self._accept(drawn, candidates)
            self.seating.settle(self._stepping)
            for job in ended:
                self._end(job).finish()
        seconds = self._clock.stop()
        step = StepTime(flight.tokens, flight.prompt_tokens, sampled, seconds)
        self._observer.after_step(step, flight.reports, flight.residency)
        return True

    def _begin(self) -> Flight | None:
        """Starts the next step; None if there is nothing to run."""
        with hold_interrupts():
            self._mend()
            run = self.seating.schedule()
            self._stepping = tuple(job for job, _ in run)
            if not run:
                return None
            inputs = [(job, row, new) for job, count in run for row, new in job.inputs(count)]
            room = self.seating.make_room(inputs)
        return take_off(self.runner, run, room, self._observer.mover.residency)

    def _begin_ahead(self, flight: Flight, draw: Draw) -> Flight | None:
        """Starts the step after this one with the tokens that are being sampled, if that is it."""
        jobs = self._stepping
        if not self._look_ahead or self._submitted or not flight.may_be_followed:
            return None
        with hold_interrupts():
            room = self.seating.make_room_ahead(jobs)
        if room is None:
            return None
        run = [(job, 1) for job in jobs]
        residency = self._observer.mover.residency
        return take_off(self.runner, run, room, residency, draw.sampled.token)

    def _take_ahead(self) -> Flight | None:
        """The step that was started ahead, for those of its requests that still go on."""
        flight, self._ahead = self._ahead, None
        if flight is None:
            return None
        flight = flight.without(lambda job: job.handle not in self._handles)
        self._stepping = tuple(job for job, _ in flight.run)
        for job in self._stepping:
            job.ahead = 0
        if not flight.run:
            self._observer.after_other(flight.reports)
            return None
        return flight

    def _accept(
        self,
        drawn: dict[Continuation, list[Drawn] | ValueError],
        candidates: dict[BeamGroup, Candidates],
    ) -> list[Running]:
        """Adds to each request what was found for it; returns those that have ended well."""
        ended: list[Running] = []
        for text, found in drawn.items():
            if isinstance(found, ValueError):
                self._end(text).handle.fail(found)
            elif text.accept(found):
                ended.append(text)
        for group, best in candidates.items():
            try:
                over = group.accept(best)
            except ValueError as error:
                self._end(group).handle.fail(error)
            else:
                ended += [group] * over
        return ended

    def _end(self, job: Running) -> Running:
        """Takes a request out; what it gave is for the caller to hand over."""
        del self._handles[job.handle]
        self.seating.leave(job)
        return job

    def _mend(self) -> None:
        """Starts over if an interrupted step took the pages with it."""
        if self.runner.restore_kv():
            self._start_over()

    def _start_over(self) -> None:
        self.runner.restore_kv()
        self._ahead = None
        self._sampler.clear()
        for job in self.seating.start_over():
            del self._handles[job.handle]
            job.handle.fail(
                RuntimeError(
                    "an interrupt took the keys and values of this request, and computed again "
                    "they would differ: its rotary frequencies follow the length; submit it again"
                )
            )
        self._observer.after_other()
