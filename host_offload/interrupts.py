"""Holds Ctrl-C back while something runs that must not be cut in the middle; knows not what."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Delays an interrupt (SIGINT) that arrives inside the block until the block has ended.

    Only the main thread is ever interrupted, so in other threads this does nothing.
    """
    usual = signal.getsignal(signal.SIGINT)
    # None: not installed from Python, so it could not be put back.
    if threading.current_thread() is not threading.main_thread() or usual is None:
        yield
        return
    held: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            signal.raise_signal(signal.SIGINT)
