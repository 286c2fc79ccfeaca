"""Measured times are sane."""

import time

import numpy as np

from host_offload.calibrate import measure_link, measure_read_rate, random_arrays, seconds_of


def test_the_first_call_is_not_timed():
    calls = []

    def slow_at_first():
        time.sleep(0.002 if calls else 0.2)
        calls.append(None)

    seconds = seconds_of(slow_at_first, repeats=3)
    assert len(calls) == 4
    assert 0.002 <= seconds < 0.1


def test_the_median_ignores_one_slow_call():
    calls = []

    def slow_once():
        calls.append(None)
        time.sleep(0.3 if len(calls) == 3 else 0.001)

    assert seconds_of(slow_once, repeats=5) < 0.15


def test_arrays_lie_where_they_are_timed():
    one, two = random_arrays([(4, 5), (3,)], np.float32, "pinned_host")
    assert (one.shape, two.shape) == ((4, 5), (3,))
    assert one.sharding.memory_kind == "pinned_host"
    assert one.dtype == np.float32
    assert 0 < abs(np.asarray(one)).max() < 1


def test_copies_over_the_link_take_time():
    seconds = measure_link(random_arrays([(256, 256)], np.float32, "pinned_host"))
    assert 0 < seconds < 1


def test_memory_is_read_at_a_rate_a_machine_can_have():
    assert 1e7 < measure_read_rate(1 << 24) < 1e14
