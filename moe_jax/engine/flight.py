"""Steps that have been started: who runs in them, and what they will give.

Knows the runner; who runs is decided by others, and so is what becomes of the results.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Array, Float, Int

from host_offload.threads import give_way
from moe_jax.engine.batch import bucket_of
from moe_jax.engine.continuation import Continuation
from moe_jax.engine.runner import Runner, StepReport
from moe_jax.engine.seating import Room, Running
from moe_jax.placement.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A step whose programs have been started.

    Attributes:
      run: its requests, and how many new tokens each of their rows had.
      restarts: how often each had been restarted by then.
      tokens, prompt_tokens: new tokens, all of them and those of prompts.
      places: which rows of the logits are whose.
      reports: what its programs will report.
      residency: which experts were resident.
    """

    run: tuple[tuple[Running, int], ...]
    restarts: tuple[int, ...]
    tokens: int
    prompt_tokens: int
    places: dict[Running, list[int]]
    logits: Float[Array, "rows vocab"]
    reports: tuple[StepReport, ...]
    residency: Residency

    @property
    def done(self) -> bool:
        """Whether its results are there."""
        logits: Any = self.logits  # jax does not declare the method
        return logits.is_ready()

    @property
    def may_be_followed(self) -> bool:
        """Whether the next step is known: its tokens are those sampled from these logits, in order.

        If one of them ends its text, that step is in vain for it.
        """
        rows = [[row] for row in range(len(self.run))]
        return (
            self.logits.shape[0] == bucket_of(len(self.run))
            and list(self.places.values()) == rows
            and all(_surely_goes_on(job) for job in self.places)
        )

    def without(self, ended: Callable[[Running], bool]) -> "Flight":
        """This step without requests that have ended, or begun anew since."""
        left = [
            (job, count, restarts)
            for (job, count), restarts in zip(self.run, self.restarts, strict=True)
            if not ended(job) and job.restarts == restarts
        ]
        return replace(
            self,
            run=tuple((job, count) for job, count, _ in left),
            restarts=tuple(restarts for _, _, restarts in left),
            places={job: self.places[job] for job, _, _ in left if job in self.places},
        )


def take_off(
    runner: Runner,
    run: Sequence[tuple[Running, int]],
    room: Room,
    residency: Residency,
    sampled: Int[Array, " rows"] | None = None,
) -> Flight:
    """Starts a step's programs; does not wait for them.

    `sampled` are the tokens of the batch, one for each row, where they are still on the device.
    """
    if room.copies is not None:
        runner.copy_pages(room.copies)
    prompt_tokens = sum(count for job, count in run if not job.decoding)
    logits = runner.step(room.batch, room.wanted, sampled)
    return Flight(
        run=tuple(run),
        restarts=tuple(job.restarts for job, _ in run),
        tokens=sum(len(new.tokens) for new in room.batch),
        prompt_tokens=prompt_tokens,
        places=room.places,
        logits=logits,
        reports=tuple(runner.take_reports()),
        residency=residency,
    )


def _surely_goes_on(job: Running) -> bool:
    """Whether the token that is sampled for it, and nothing else, makes its next step.

    If that token ends the text, the step will be in vain; ends because of a text's length are known
    before. What is not known is how a beam search goes on, or what is guessed after the token.
    """
    return (
        isinstance(job, Continuation)
        and job.decoding
        and not job.request.params.prompt_lookup
        and job.new_tokens + 1 < job.request.limit
    )


class StepClock:
    """The seconds that steps take, one after another.

    A step that was started ahead counts from the end of the step before it. If its results were
    there before anybody asked for them, whoever asks may have been away: then what passed until he
    asked counts as one step at most.
    """

    def __init__(self) -> None:
        self._ended = self._began = time.perf_counter()
        self._usual = float("inf")
        self._watched: Callable[[], bool] | None = None
        self._seen: float | None = None

    def start(self, *, ahead: bool, done: bool = False) -> None:
        """A step begins, or one that was started ahead goes on, or is done already."""
        now = time.perf_counter()
        passed = now - self._ended if ahead else 0.0
        self._began = now - (min(passed, self._usual) if done else passed)
        self._watched = self._seen = None

    def watch(self, done: Callable[[], bool]) -> None:
        """Takes the step for ended as soon as `look` is told so by `done`."""
        self._watched = done

    def look(self) -> None:
        """Sees whether the watched step is done; costs a microsecond."""
        if self._watched is not None and self._watched():
            self._watched, self._seen = None, time.perf_counter()

    def give_way(self) -> None:
        """Lets other threads have this core, then looks."""
        give_way()
        self.look()

    def stop(self) -> float:
        """The step has ended, unless it was seen to have before; its seconds."""
        self._ended = time.perf_counter() if self._seen is None else self._seen
        self._usual = self._ended - self._began
        self._watched = None
        return self._usual
