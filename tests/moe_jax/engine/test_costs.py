"""Costs are measured once, kept, and measured again when what was kept is not true."""

import json
import logging
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_offload import calibration_cache
from host_offload.calibrate import TimeBox
from host_offload.calibration import SIZES, Calibration, Curve
from moe_jax.checkpoint import open_checkpoint
from moe_jax.engine import costs, expert_timing
from moe_jax.engine.costs import calibrate, force, measure_costs
from moe_jax.engine.expert_timing import ExpertTiming
from moe_jax.model.ops import gated_ffn
from tests.tolerances import assert_close

FLOAT32 = np.dtype(np.float32)
SCRIPT = Path(__file__).parents[3] / "scripts" / "calibrate.py"


@pytest.fixture
def config(tiny):
    return open_checkpoint(tiny).config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, on disk and in the process."""
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "_checked", {})
    return tmp_path / "cache" / "calibration"


def curve(scale):
    seconds = tuple(scale * (1.0 + size) for size in SIZES)
    return Curve(seconds=seconds, p90=seconds, measured=(True,) * len(SIZES))


FOUND = Calibration(
    sizes=SIZES,
    host=curve(2.0),
    device=curve(1.0),
    work_bytes=1000,
    transfer=0.5,
    link_latency=0.25,
    host_launch=0.125,
    read_rate=4000.0,
    spent=3.0,
)


class Scripted:
    """Stands in for measuring: counts, and returns what a test prepared."""

    def __init__(self, monkeypatch):
        self.measured = 0
        self.probed = 0
        self.difference = None
        self.found = FOUND
        monkeypatch.setattr(ExpertTiming, "measure", lambda _, progress=False: self._measure())
        monkeypatch.setattr(ExpertTiming, "differs", lambda _, kept: self._differs())

    def _measure(self):
        self.measured += 1
        return self.found

    def _differs(self):
        self.probed += 1
        return self.difference


@pytest.fixture
def scripted(monkeypatch):
    return Scripted(monkeypatch)


def new_process(monkeypatch):
    monkeypatch.setattr(costs, "_checked", {})


def test_the_second_process_reads_what_the_first_measured(
    config, scripted, monkeypatch, folder, caplog
):
    assert calibrate(config, FLOAT32) == FOUND
    assert calibrate(config, FLOAT32) == FOUND
    assert (scripted.measured, scripted.probed) == (1, 0)
    new_process(monkeypatch)
    assert calibrate(config, FLOAT32) == FOUND
    assert calibrate(config, FLOAT32) == FOUND  # checked once per process
    assert (scripted.measured, scripted.probed) == (1, 1)
    assert len(list(folder.iterdir())) == 1
    assert not caplog.records


def test_experts_of_another_kind_are_measured_for_themselves(config, scripted, folder):
    wider = replace(config, moe=replace(config.moe, ffn=20))
    other = replace(config, activation="relu")
    for each in (config, wider, other):
        calibrate(each, FLOAT32)
    calibrate(config, np.dtype(jnp.bfloat16))
    assert scripted.measured == 4
    assert len(list(folder.iterdir())) == 4


def test_measured_again_on_demand(config, scripted):
    calibrate(config, FLOAT32)
    scripted.found = replace(FOUND, transfer=0.75)
    assert calibrate(config, FLOAT32, recalibrate=True).transfer == 0.75
    assert calibrate(config, FLOAT32).transfer == 0.75


def test_a_kept_calibration_that_is_not_true_is_replaced_and_said(
    config, scripted, monkeypatch, caplog
):
    calibrate(config, FLOAT32)
    new_process(monkeypatch)
    scripted.difference = "the host takes 7 ms"
    scripted.found = replace(FOUND, transfer=0.75)
    assert calibrate(config, FLOAT32).transfer == 0.75
    assert "the host takes 7 ms; measuring again" in caplog.text
    # However noisy the machine, a process measures once.
    assert calibrate(config, FLOAT32).transfer == 0.75
    assert scripted.measured == 2
    new_process(monkeypatch)
    scripted.difference = None
    assert calibrate(config, FLOAT32).transfer == 0.75


def from_another_machine(text):
    content = json.loads(text)
    content["key"]["cpu"] = "another"
    return json.dumps(content)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda text: text[: len(text) // 2], "not JSON, or not all of it"),
        (lambda text: text + " " * 70_000, "more than 65536 bytes"),
        (lambda text: text.replace('"format": 1', '"format": 99'), "format is 99, not 1"),
        (from_another_machine, "measured with cpu 'another'"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_and_made_anew(
    config, scripted, monkeypatch, folder, caplog, damage, reason
):
    calibrate(config, FLOAT32)
    (file,) = folder.iterdir()
    good = file.read_text()
    file.write_text(damage(good))
    new_process(monkeypatch)
    assert calibrate(config, FLOAT32) == FOUND
    assert scripted.measured == 2
    assert reason in caplog.text and str(file) in caplog.text
    assert file.read_text() == good


def test_a_folder_that_cannot_be_written_is_said(config, scripted, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "file"))
    for _ in range(2):
        assert calibrate(config, FLOAT32) == FOUND
    assert scripted.measured == 1
    assert f"cannot be kept in {tmp_path / 'file' / 'calibration'}" in caplog.text


def test_no_folder_at_all_is_said(config, scripted, monkeypatch, caplog):
    def homeless():
        raise OSError("there is no home folder")

    monkeypatch.setattr(calibration_cache, "cache_folder", homeless)
    for _ in range(2):
        assert calibrate(config, FLOAT32) == FOUND
    assert scripted.measured == 1
    assert "calibrations cannot be kept: there is no home folder" in caplog.text


def test_what_was_inferred_is_said(config, scripted, caplog):
    measured = tuple(size in (1, 64) for size in SIZES)
    scripted.found = replace(FOUND, host=replace(FOUND.host, measured=measured))
    calibrate(config, FLOAT32)
    assert "on the host with 2, 4, 8, 16, 32, 128, 256, 512 tokens is inferred" in caplog.text
    assert "on the device" not in caplog.text


@pytest.mark.parametrize(
    "backend, host_beside, link_beside", [("cpu", 0, 0), ("gpu", 1, 1), ("tpu", 0, 1)]
)
def test_curves_say_what_the_planner_needs(
    config, scripted, monkeypatch, backend, host_beside, link_beside
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    curves = measure_costs(config, FLOAT32)
    assert curves.tokens.tolist() == list(SIZES)
    assert curves.host.tolist() == list(FOUND.host.seconds)
    assert curves.device.tolist() == list(FOUND.device.seconds)
    assert (curves.stream, curves.link_latency, curves.host_launch) == (0.5, 0.25, 0.125)
    assert curves.memory == 0.25
    assert (curves.host_beside, curves.link_beside) == (host_beside, link_beside)


def test_one_way_can_be_forced(config, scripted):
    curves = measure_costs(config, FLOAT32)
    assert force(curves, "auto") is curves
    assert np.isinf(force(curves, "stream").host).all()
    assert np.isinf(force(curves, "host").stream)
    assert np.isfinite(force(curves, "host").host).all()


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


def test_shares_of_huge_experts_that_would_not_end_in_time_are_left_out(config, monkeypatch):
    now = [0.0]

    def one_second(*_):
        now[0] += 1.0
        return expert_timing.Timing(median=2.0, p90=2.0)  # four calls of 512 tokens take 64 s

    timing = ExpertTiming(config, FLOAT32)
    monkeypatch.setattr(timing, "_time", one_second)
    found = timing.measure(box=TimeBox(38.0, lambda: now[0]))
    assert found.host.measured == tuple(size not in (256, 512) for size in SIZES)
    assert found.spent == 16


def test_measured_calibrations_can_be_kept(measured, tmp_path):
    timing, found = measured
    calibration_cache.write(tmp_path / "a.json", timing.key, found)
    assert calibration_cache.read(tmp_path / "a.json", timing.key) == found


def test_probes_tell_a_calibration_of_a_faster_machine(measured):
    timing, found = measured
    faster = replace(found.host, seconds=tuple(1e3 + s for s in found.host.seconds))
    assert "1 token on the host takes" in timing.differs(replace(found, host=faster))


@pytest.fixture
def probed(measured, monkeypatch):
    """What the probes find, in their order."""

    def probed(host, link):
        times = {"host": iter(host), "link": iter(link)}
        timing_of = lambda seconds: expert_timing.Timing(median=seconds, p90=seconds)
        timing = measured[0]
        monkeypatch.setattr(timing, "_time", lambda *_: timing_of(next(times["host"])))
        monkeypatch.setattr(
            expert_timing, "measure_transfers", lambda *_: (0.0, next(times["link"]))
        )
        return timing.differs(FOUND)  # 4 s on the host, 0.5 s over the link

    return probed


@pytest.mark.parametrize(
    "host, link",
    [
        ((4.9,), (0.4,)),
        ((9.0, 9.0, 4.1), (0.5,)),  # the machine was busy at first
        ((4.0,), (5.0, 5.0, 0.6)),
    ],
)
def test_one_agreement_is_enough(probed, host, link):
    assert probed(host, link) is None


@pytest.mark.parametrize(
    "host, link, message",
    [
        ((9.0, 9.0, 6.0), (), "on the host takes 6e+03 ms, 1.50 times"),
        ((4.0,), (0.1, 0.1, 0.25), "over the link takes 250 ms, 0.50 times"),
    ],
)
def test_three_disagreements_are_believed(probed, host, link, message):
    assert message in probed(host, link)


@pytest.mark.parametrize("size", [1, 4, 64, 512])
@pytest.mark.parametrize("group", [2, 4])
def test_what_is_timed_are_experts(config, monkeypatch, size, group):
    """Every block of the timed programs is a gated product with the expert that owns it."""
    monkeypatch.setattr(expert_timing, "_LARGE_EXPERT", 1 if group == 2 else 1 << 40)
    timing = ExpertTiming(config, FLOAT32)
    assert timing.group == group
    seen = []

    def time_beside(function, baseline, box):
        seen.append((function(1), baseline(1)))
        return expert_timing.Timing(median=1.0, p90=1.0)

    monkeypatch.setattr(expert_timing, "time_beside", time_beside)
    on_host, on_device = timing._on_host(), timing._on_device()
    timing._time(timing._host_program, on_host, TimeBox(1.0), size)
    result = timing._time(timing._device_program, on_device, TimeBox(1.0), size)
    (host, idle_host), (device, idle_device) = seen
    assert_close(host, device)
    assert not idle_host.any() and not idle_device.any()
    experts = round(1 / result.median)
    used = experts * size  # their blocks follow one another
    assert host[:, :used].any(axis=0).all() and not host[:, used:].any()
    (x,) = expert_timing.random_arrays([host.shape], FLOAT32, "device")
    assert_close(host[:, :used], gated_ffn(*on_device[0][0], x[:, :used], "silu"))


def test_experts_in_int8_are_timed_as_such(config, monkeypatch):
    monkeypatch.setattr(expert_timing, "_LARGE_EXPERT", 1)
    timing = ExpertTiming(config, FLOAT32, "int8")
    assert timing.bytes == 3 * 16 * 12 + 4 * (24 + 16)
    assert timing.key != ExpertTiming(config, FLOAT32).key
    groups = timing._on_host()
    assert {part.dtype.name for part in groups[0][0]} == {"int8", "float32"}
    assert timing._time(timing._host_program, groups, TimeBox(0.0), 4).median > 0


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


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(expert_timing, "SECONDS", 0.0)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_prints_a_table(tiny, monkeypatch, capsys):
    run_script(monkeypatch, tiny, "--dtype", "float32")
    printed = capsys.readouterr().out
    for text in ("embed 16, ffn 12, float32", "host memory  read at", "of limit", "stream ms"):
        assert text in printed
    assert [line.split()[0] for line in printed.splitlines() if line[:6].strip().isdigit()] == [
        str(size) for size in SIZES
    ]
    assert "* inferred from other counts" in printed


def test_the_script_times_experts_kept_in_8_bits(tiny, monkeypatch, capsys):
    run_script(monkeypatch, tiny, "--host-dtype", "int8")
    # 3 products of 16 by 12, and a scale for each of 2 * 12 + 16 rows.
    assert "bfloat16, int8 in host memory, 736 B;" in capsys.readouterr().out


def test_the_script_flags_a_slow_host_and_prints_json(tiny, scripted, monkeypatch, capsys):
    run_script(monkeypatch, tiny)
    # 1000 bytes in 4 s and more, where 4000 bytes per second could be read.
    assert "SLOW: with 1 token(s) the host reads weights at 6% of the read limit" in (
        capsys.readouterr().out
    )
    run_script(monkeypatch, tiny, "--json", "--again")
    result = json.loads(capsys.readouterr().out)
    assert scripted.measured == 2
    assert result["rows"][0]["host"] == 4.0 and result["rows"][0]["stream"] == 2.75


def test_the_script_draws(tiny, scripted, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run_script(monkeypatch, tiny, "--out", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_script_names_the_extra_before_measuring(
    tiny, scripted, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"pip install 'moe-jax\[train\]'"):
        run_script(monkeypatch, tiny, "--out", tmp_path / "curves.png")
    assert scripted.measured == 0
