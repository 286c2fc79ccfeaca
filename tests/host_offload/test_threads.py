"""Giving way to other threads."""

import importlib
import os

from host_offload import threads


def test_it_is_asked_of_the_operating_system_where_that_can(monkeypatch):
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "sched_yield", lambda: calls.append(1), raising=False)
        importlib.reload(threads).give_way()
        assert calls == [1]
        patch.delattr(os, "sched_yield")
        importlib.reload(threads).give_way()
    importlib.reload(threads)
    assert calls == [1]
