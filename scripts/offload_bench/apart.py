"""Runs one measurement in a process of its own: its memory, and its crash, end with it.

Knows functions and time; nothing about what is measured.
"""

import multiprocessing
import time
from collections.abc import Callable
from inspect import isgenerator
from multiprocessing.connection import Connection
from typing import Any


class Failure(Exception):
    """Why a measurement gave no result, or not the whole of it."""


def run_apart(
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float | None = None,
    seen: Callable[[Any], None] = lambda value: None,
) -> Any:
    """Returns function(*arguments), computed in a fresh process that has ended afterwards.

    Of a generator, `seen` gets each value as it comes, and the last one is the result.

    Raises Failure if the function raises, its process dies, or it takes more than `seconds`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    end = None if seconds is None else time.monotonic() + seconds
    process.start()
    theirs.close()
    try:
        while True:
            if not ours.poll(None if end is None else max(end - time.monotonic(), 0)):
                raise Failure(f"stopped after {seconds:.0f} s, the time is over")
            kind, value = ours.recv()
            if kind == "problem":
                raise Failure(value)
            if kind == "result":
                return value
            seen(value)
    except EOFError:
        process.join()
        raise Failure(f"its process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
        if isgenerator(result):
            values, result = result, None
            for result in values:
                pipe.send(("seen", result))
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        pipe.send(("problem", f"{type(error).__name__}: {first[0][:300]}"))
        raise
    pipe.send(("result", result))
