"""Measured times are sane, and measuring ends in time."""

import time

import numpy as np
import pytest

from host_offload import calibrate
from host_offload.calibrate import (
    TimeBox,
    cache_bytes,
    measure_host_launch,
    measure_in_time,
    measure_product_rate,
    measure_read_rate,
    measure_transfers,
    random_arrays,
    seconds_of,
    time_beside,
)
from host_offload.calibration import Timing


class FakeClock:
    """Time passes only in work that says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return FakeClock()


def test_the_first_call_is_not_timed():
    calls = []

    def slow_at_first():
        time.sleep(0.002 if calls else 0.2)
        calls.append(None)

    seconds = seconds_of(slow_at_first, repeats=3)
    assert len(calls) == 4
    assert 0.002 <= seconds < 0.1


def test_the_median_ignores_one_slow_call(clock):
    calls = []

    def slow_once():
        calls.append(None)
        clock.work(0.3 if len(calls) == 3 else 0.001)

    assert seconds_of(slow_once, repeats=5, clock=clock) == pytest.approx(0.001)
    calls.clear()
    assert seconds_of(slow_once, repeats=5, clock=clock, pick=max) == pytest.approx(0.3)


def test_what_a_call_takes_beyond_a_baseline(clock):
    numbers = []

    def work(number):
        numbers.append(number)
        clock.work(5.0 if number == 0 else 0.03)

    timing = time_beside(work, lambda _: clock.work(0.01), TimeBox(100.0, clock), seconds=0.1)
    assert timing.median == pytest.approx(0.02)
    assert timing.p90 == pytest.approx(0.02)
    assert numbers == [0, 1, 2, 3]  # at least three, until 0.1 s have passed


def test_short_calls_are_repeated_up_to_a_limit(clock):
    calls = []
    box = TimeBox(100.0, clock)
    time_beside(calls.append, lambda _: None, box, repeats=(3, 9), untimed=2)
    assert calls == list(range(11))


def test_noise_gives_no_negative_time(clock):
    timing = time_beside(lambda _: None, lambda _: clock.work(1.0), TimeBox(100.0, clock))
    assert 0 < timing.median < 1e-6


def test_once_the_box_is_spent_one_repeat_will_do(clock):
    calls = []

    def work(number):
        calls.append(number)
        clock.work(10.0)

    assert time_beside(work, lambda _: None, TimeBox(1.0, clock)).median == pytest.approx(10)
    assert len(calls) == 2


def tasks(clock, *seconds):
    timing = Timing(median=1.0, p90=1.0)
    return {number: lambda s=s: clock.work(s) or timing for number, s in enumerate(seconds)}


@pytest.mark.parametrize(
    "seconds, done",
    [
        ((1, 1, 1, 1), [0, 1, 2, 3]),
        ((3, 3, 3, 3), [0, 1, 2]),  # the fourth would have ended after 12 s
        ((1, 6, 1, 1), [0, 1]),  # another one like the second would not have ended in time
        ((20, 20, 1, 1), [0, 1]),  # essential ones run whatever they take
    ],
)
def test_the_time_box_is_respected(clock, seconds, done):
    box = TimeBox(10.0, clock)
    assert list(measure_in_time(tasks(clock, *seconds), 2, box)) == done


def test_a_task_may_decide_for_itself_that_it_takes_too_long(clock):
    some = tasks(clock, 1, 1, 1)
    some[1] = lambda: None
    assert list(measure_in_time(some, 0, TimeBox(10.0, clock))) == [0, 2]


def test_arrays_lie_where_they_are_timed():
    one, two = random_arrays([(4, 5), (3,)], np.float32, "pinned_host")
    assert (one.shape, two.shape) == ((4, 5), (3,))
    assert one.sharding.memory_kind == "pinned_host"
    assert one.dtype == np.float32
    assert 0 < abs(np.asarray(one)).max() < 1


def test_latency_and_seconds_of_a_transfer_are_told_apart():
    item = lambda: random_arrays([(512, 512), (256,)], np.float32, "pinned_host")
    latency, seconds = measure_transfers([[item(), item()], [item(), item()]], TimeBox(1.0))
    assert 0 <= latency < 1 and 0 < seconds < 1


def test_a_host_call_comes_back():
    assert 0 < measure_host_launch(TimeBox(1.0)) < 1


@pytest.mark.parametrize("kind", ["device", "pinned_host"])
def test_memory_is_read_at_a_rate_a_machine_can_have(kind):
    assert 1e7 < measure_read_rate(1 << 24, kind, repeats=2) < 1e14


def test_what_the_link_reads_beside_the_host_counts(monkeypatch):
    monkeypatch.setattr(calibrate, "seconds_of", lambda function, repeats, pick: function() and 2.0)
    beside = random_arrays([(1 << 10,), (1 << 11,)], np.int8, "pinned_host")
    assert measure_read_rate(1 << 14, "pinned_host", beside=beside) == ((1 << 14) + 3 * 1024) / 2


def test_products_are_made_at_a_rate_a_machine_can_have():
    assert 1e8 < measure_product_rate("float32", repeats=1) < 1e16


def test_the_cache_has_a_size():
    assert 1 << 16 <= cache_bytes() < 1 << 36
