"""Runs one measurement in a process of its own: its memory, and its crash, end with it.

Knows functions and time; nothing about what is measured.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


class Failure(Exception):
    """Why a measurement gave no result."""


def run_apart(function: Callable[..., Any], *arguments: Any, seconds: float | None = None) -> Any:
    """Returns function(*arguments), computed in a fresh process that has ended afterwards.

    Raises Failure if the function raises, its process dies, or it takes more than `seconds`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise Failure(f"stopped after {seconds:.0f} s, the time is over")
        result, problem = ours.recv()
    except EOFError:
        process.join()
        raise Failure(f"its process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        ours.close()
    if problem is not None:
        raise Failure(problem)
    return result


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        first = str(error).strip().splitlines() or [""]
        pipe.send((None, f"{type(error).__name__}: {first[0][:300]}"))
        raise
    pipe.send((result, None))
