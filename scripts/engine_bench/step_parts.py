"""Times the parts of an engine's steps, by wrapping the methods that do them.

Knows where the engine does what; changes nothing that it does.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import jax

import moe_jax

# Methods of the engine's loop and of what it holds; a part may have several.
PARTS = {
    "scheduling": ("seating.schedule", "seating.make_room", "seating.settle", "seating.leave"),
    "model": ("runner.step",),
    "sampling": ("_sampler.sample", "_sampler.read"),
    "handing out": ("_accept",),
    "statistics": ("_observer.after_step", "_observer.catch_up"),
    "step": ("_step",),
}


class StepParts:
    """The seconds of each part, step by step, and how many requests were in the step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch(self, engine: moe_jax.Engine) -> Iterator[None]:
        """Times every step of this engine until it is left; none is started during another."""
        loop: Any = engine._loop

        def requests() -> int:
            return len(loop._stepping)

        with ExitStack() as wrapped:
            wrapped.enter_context(mock.patch.object(loop, "_look_ahead", False))
            for part, methods in PARTS.items():
                for method in methods:
                    *path, name = method.split(".")
                    owner = loop
                    for attribute in path:
                        owner = getattr(owner, attribute)
                    timed = self._timed(part, getattr(owner, name), requests)
                    wrapped.enter_context(mock.patch.object(owner, name, timed))
            yield

    def _timed(self, part: str, method: Any, requests: Callable[[], int]) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = method(*arguments, **named)
            if part == "model":  # else its time would pass where somebody waits for it
                jax.block_until_ready(result)
            self._parts[part] += time.perf_counter() - began
            if part == "step":
                if result:  # something ran
                    self.steps.append({**self._parts, "requests": requests()})
                self._parts.clear()
            return result

        return call
