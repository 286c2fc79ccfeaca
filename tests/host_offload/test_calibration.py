"""Curves recover what made the timings, and never fall."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from host_offload.calibration import (
    SIZES,
    Timing,
    curve_of,
    fit_flat_then_linear,
    fit_line,
    rising,
    timing_of,
)

SECONDS = st.floats(1e-6, 10)


def exactly(seconds):
    return Timing(median=seconds, p90=seconds * 1.5)


def test_times_are_summed_up():
    timing = timing_of([3.0, 1.0, 2.0, -1.0])
    assert (timing.median, timing.p90) == (1.5, pytest.approx(2.7))
    assert timing.scaled(2.0).median == 3.0


def test_nothing_takes_less_than_no_time():
    assert timing_of([-1.0, -2.0, 3.0]).median == 1e-9


@given(st.lists(SECONDS, min_size=1, max_size=12))
def test_isotonic_regression_never_falls_and_keeps_the_sum(values):
    result = rising(values)
    assert all(a <= b for a, b in itertools.pairwise(result))
    assert sum(result) == pytest.approx(sum(values))


@pytest.mark.parametrize(
    "values, expected",
    [
        ((1.0, 2.0, 3.0), (1, 2, 3)),
        ((3.0, 1.0, 2.0), (2, 2, 2)),
        ((1.0, 3.0, 2.0, 4.0), (1, 2.5, 2.5, 4)),
    ],
)
def test_isotonic_regression_pools_neighbours(values, expected):
    assert rising(values) == expected


@given(st.dictionaries(st.sampled_from(SIZES), SECONDS, min_size=1))
def test_curves_of_any_timings_are_whole_and_rise(timings):
    curve = curve_of(SIZES, {size: exactly(s) for size, s in timings.items()})
    for values in (curve.seconds, curve.p90):
        assert len(values) == len(SIZES)
        assert all(0 < a <= b for a, b in itertools.pairwise(values))
    assert all(a <= b for a, b in zip(curve.seconds, curve.p90, strict=True))
    assert curve.measured == tuple(size in timings for size in SIZES)


def test_missing_sizes_are_inferred():
    curve = curve_of(SIZES, {n: exactly(s) for n, s in ((2, 2.0), (8, 2.0), (64, 9.0))})
    assert curve.seconds == (2, 2, 2, 2, 3, 5, 9, 17, 33, 65)


def test_inferred_past_the_end_no_steeper_than_from_nothing():
    curve = curve_of((1, 2, 4), {1: exactly(1.0), 2: exactly(10.0)})
    assert curve.seconds[2] == 20


@pytest.mark.parametrize(
    "start, bandwidth, arithmetic",
    [(100e-6, 25e9, 1e12), (20e-6, 30e9, 0.4e12), (300e-6, 60e9, 4e12), (1e-4, 25e9, 2e12)],
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_what_made_the_times_is_recovered(start, bandwidth, arithmetic, noise):
    parameters = 3 * 2048 * 4096
    n = np.asarray(SIZES)
    seconds = start + np.maximum(2 * parameters / bandwidth, 2 * parameters * n / arithmetic)
    seconds *= 1 + noise * np.random.default_rng(0).uniform(-1, 1, n.shape)
    curve = curve_of(SIZES, {int(size): exactly(s) for size, s in zip(n, seconds, strict=True)})
    fitted, floor, per_row = fit_flat_then_linear(SIZES, curve.seconds)
    assert 2 * parameters / per_row == pytest.approx(arithmetic, rel=0.05)
    assert fitted + floor == pytest.approx(start + 2 * parameters / bandwidth, rel=0.05)
    if not noise:  # the start is a small part of any time: noise drowns it
        assert fitted == pytest.approx(start, rel=0.05)
        assert 2 * parameters / floor == pytest.approx(bandwidth, rel=0.05)


def test_sizes_that_are_all_flat_have_no_start_of_their_own():
    assert fit_flat_then_linear((1, 2, 4), (3.0, 3.0, 3.0)) == pytest.approx((0, 3, 0))


def test_sizes_that_are_all_on_the_line_have_no_flat_part():
    assert fit_flat_then_linear((1, 2, 4), (3.0, 5.0, 9.0)) == pytest.approx((1, 2, 2))


def test_a_line_is_recovered():
    assert fit_line((0, 1, 4), (0.5, 2.5, 8.5)) == pytest.approx((0.5, 2.0))


@pytest.mark.parametrize("seconds", [(2.0, 1.0), (0.0, 9.0)])
def test_noise_gives_no_negative_latency(seconds):
    latency, per_item = fit_line((1, 2), seconds)
    assert latency == 0 and per_item == pytest.approx(sum(seconds) / 3)
