"""What is timed for a calibration are experts, of the model's kind, within the given time."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from host_offload import calibration_cache
from host_offload.calibrate import TimeBox
from host_offload.calibration import SIZES
from moe_jax.checkpoint import open_checkpoint
from moe_jax.engine import expert_timing
from moe_jax.engine.expert_timing import ExpertTiming
from moe_jax.model.ops import gated_ffn
from tests.calibrations import FOUND
from tests.tolerances import assert_close

FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def config(tiny):
    return open_checkpoint(tiny).config


@pytest.fixture(scope="module")
def measured(tiny):
    """A real one, for which there was no time but for what is essential."""
    timing = ExpertTiming(open_checkpoint(tiny).config, FLOAT32)
    return timing, timing.measure(box=TimeBox(0.0))


def test_without_time_the_essential_is_measured(measured):
    timing, found = measured
    assert found.sizes == SIZES
    assert found.work_bytes == timing.bytes == 3 * 16 * 12 * 4
    for each in (found.host, found.device):
        assert each.measured == tuple(size in (1, 64) for size in SIZES)
        assert all(0 < a <= b for a, b in zip(each.seconds, each.seconds[1:], strict=False))
    assert 0 < found.transfer < 1 and found.read_rate > 1e7
    assert found.work_bytes / found.read_rate <= found.host.seconds[0]


def test_shares_of_huge_experts_that_would_not_end_in_time_are_left_out(config, monkeypatch):
    now = [0.0]

    def one_second(*_, **__):
        now[0] += 1.0
        return expert_timing.Timing(median=2.0, p90=2.0)  # four calls of 512 tokens take 64 s

    timing = ExpertTiming(config, FLOAT32)
    monkeypatch.setattr(timing, "_time", one_second)
    found = timing.measure(box=TimeBox(39.0, lambda: now[0]))
    assert found.host.measured == tuple(size not in (256, 512) for size in SIZES)
    assert found.spent == 17


def test_measured_calibrations_can_be_kept(measured, tmp_path):
    timing, found = measured
    calibration_cache.write(tmp_path / "a.json", timing.key, found)
    assert calibration_cache.read(tmp_path / "a.json", timing.key) == found


def test_probes_tell_a_calibration_of_a_faster_machine(measured):
    timing, found = measured
    faster = replace(found.host, seconds=tuple(1e3 + s for s in found.host.seconds))
    assert "1 token on the host takes" in timing.differs(replace(found, host=faster))


def test_a_calibration_of_other_experts_is_told_without_a_probe(measured):
    timing, found = measured
    assert "is of 1 bytes, not 2304" in timing.differs(replace(found, work_bytes=1))


@pytest.fixture
def probed(measured, monkeypatch):
    """What the probes find, in their order."""

    def probed(host, device, link, backend="gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        timing, link = measured[0], iter(link)
        places = {timing._host_program: iter(host), timing._device_program: iter(device)}

        def time(program, *_):
            seconds = next(places[program])
            return expert_timing.Timing(median=seconds, p90=seconds)

        monkeypatch.setattr(timing, "_time", time)
        monkeypatch.setattr(expert_timing, "measure_transfers", lambda *_: (0.0, next(link)))
        # 4 s on the host, 65 s on the device, 0.5 s over the link
        return timing.differs(replace(FOUND, work_bytes=timing.bytes))

    return probed


@pytest.mark.parametrize(
    "host, device, link",
    [
        ((4.9,), (60.0,), (0.4,)),
        ((9.0, 9.0, 4.1), (65.0,), (0.5,)),  # the machine was busy at first
        ((4.0,), (90.0, 90.0, 70.0), (0.5,)),
        ((4.0,), (65.0,), (5.0, 5.0, 0.6)),
    ],
)
def test_one_agreement_is_enough(probed, host, device, link):
    assert probed(host, device, link) is None


@pytest.mark.parametrize(
    "host, device, link, message",
    [
        ((9.0, 9.0, 6.0), (), (), "on the host takes 6e+03 ms, 1.50 times"),
        ((4.0,), (0.065, 0.065, 0.065), (), "on the device takes 65 ms, 0.00 times"),
        ((4.0,), (65.0,), (0.1, 0.1, 0.25), "over the link takes 250 ms, 0.50 times"),
    ],
)
def test_three_disagreements_are_believed(probed, host, device, link, message):
    assert message in probed(host, device, link)


def test_without_a_link_none_is_probed(probed):
    assert probed((4.0,), (65.0,), (), backend="cpu") is None


@pytest.fixture
def scripted(config, monkeypatch):
    """A calibration in which everything takes what a test says."""

    def scripted(backend, copy=0.5, streamed=3.0, host=2.0, rate=1e3, driven=False):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        timing = ExpertTiming(config, FLOAT32, driven=driven)
        seconds = {timing._host_program: host, timing._stream_program: streamed}

        def time(program, *_, **__):
            median = seconds.get(program, 1.0)  # on the device
            return expert_timing.Timing(median=median, p90=median)

        monkeypatch.setattr(timing, "_time", time)
        monkeypatch.setattr(expert_timing, "measure_transfers", lambda *_: (0.0, copy))
        monkeypatch.setattr(expert_timing, "measure_host_launch", lambda *_: 0.0)
        monkeypatch.setattr(expert_timing, "measure_read_rate", lambda *_, **__: rate)
        return timing.measure()

    return scripted


def test_without_a_link_a_transfer_is_what_the_program_takes_longer(scripted):
    assert scripted("cpu").transfer == 2.0
    assert scripted("cpu", streamed=1.1).transfer == 0.5  # noise: it copies as well
    assert scripted("cpu", driven=True).transfer == scripted("gpu").transfer == 0.5


def test_the_read_limit_is_no_less_than_what_an_expert_reached(scripted):
    assert scripted("cpu", host=4.0, rate=1e3).read_rate == 1e3
    assert scripted("cpu", host=2.0, rate=1e3).read_rate == 2304 / 2.0


@pytest.mark.parametrize("size", [1, 4, 64, 512])
@pytest.mark.parametrize("group", [2, 4])
def test_what_is_timed_are_experts(config, monkeypatch, size, group):
    """Every block of the timed programs is a gated product with the expert that owns it."""
    monkeypatch.setattr(expert_timing, "_LARGE_EXPERT", 1 if group == 2 else 1 << 40)
    timing = ExpertTiming(config, FLOAT32)
    assert timing.group == group
    seen = []

    def time_beside(function, baseline, box, repeats):
        seen.append((function(1), baseline(1)))
        return expert_timing.Timing(median=1.0, p90=1.0)

    monkeypatch.setattr(expert_timing, "time_beside", time_beside)
    on_host, on_device = timing._on_host(), timing._on_device()
    timing._time(timing._host_program, on_host, TimeBox(1.0), size)
    timing._time(timing._stream_program, on_host, TimeBox(1.0), size)
    result = timing._time(timing._device_program, on_device, TimeBox(1.0), size)
    (host, idle_host), (streamed, idle_streamed), (device, idle_device) = seen
    assert_close(host, device)
    assert_close(streamed, device)
    assert not idle_host.any() and not idle_streamed.any() and not idle_device.any()
    experts = round(1 / result.median)
    used = experts * size  # their blocks follow one another
    assert host[:used].any(axis=1).all() and not host[used:].any()
    (x,) = expert_timing.random_arrays([host.shape], FLOAT32, "device")
    assert_close(host[:used], gated_ffn(*on_device[0][0], x[:used], "silu"))


def test_experts_in_int8_are_timed_as_such(config, monkeypatch):
    monkeypatch.setattr(expert_timing, "_LARGE_EXPERT", 1)
    timing = ExpertTiming(config, FLOAT32, "int8")
    assert timing.bytes == 3 * 16 * 12 + 4 * (24 + 16)
    assert timing.key != ExpertTiming(config, FLOAT32).key
    groups = timing._on_host()
    assert {part.dtype.name for part in groups[0][0]} == {"int8", "float32"}
    for program in (timing._host_program, timing._stream_program):
        assert timing._time(program, groups, TimeBox(0.0), 4).median > 0


def test_experts_rotate_until_caches_are_exceeded_or_the_model_is_whole(config, monkeypatch):
    timing = ExpertTiming(config, FLOAT32)
    assert timing.group * timing.groups == 8  # two layers of four
    monkeypatch.setattr(expert_timing, "cache_bytes", lambda: timing.bytes)
    assert ExpertTiming(config, FLOAT32).groups == 2  # five experts exceed four of them
    monkeypatch.setattr(expert_timing, "_MOST_COPIED", 1)
    assert ExpertTiming(config, FLOAT32).groups == 1


def test_of_huge_experts_there_is_only_one(config, monkeypatch):
    monkeypatch.setattr(expert_timing, "cache_bytes", lambda: 0)
    monkeypatch.setattr(expert_timing, "_LARGE_EXPERT", 1)
    timing = ExpertTiming(config, FLOAT32)
    ((first, second),) = timing._on_host()
    assert first.gate_up is second.gate_up  # and yet the program chooses between two
