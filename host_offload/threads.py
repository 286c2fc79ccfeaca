"""Python's thread beside those of XLA; knows nothing about arrays."""

import os

_sched_yield = getattr(os, "sched_yield", lambda: None)  # only Unix has it


def give_way() -> None:
    """Lets threads run that wait for this core; costs a microsecond if there are none.

    With few cores, a thread of XLA:CPU is often woken on the one that Python is busy on. Nobody
    moves it to the other cores when these fall idle: it waits until Python sleeps, and a program
    that has work for all cores with it. So Python gives way, often, while such programs run.
    """
    _sched_yield()
