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
from host_offload.calibration import SIZES
from moe_jax.checkpoint import open_checkpoint
from moe_jax.engine import costs, expert_timing
from moe_jax.engine.costs import calibrate, measure_costs
from moe_jax.engine.expert_timing import ExpertTiming
from tests.calibrations import FOUND

FLOAT32 = np.dtype(np.float32)
SCRIPT = Path(__file__).parents[3] / "scripts" / "calibrate.py"


@pytest.fixture
def config(tiny):
    return open_checkpoint(tiny).config


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, on disk and in the process, and costs that have to be measured."""
    monkeypatch.setattr(costs, "ExpertTiming", ExpertTiming)
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "_checked", {})
    return tmp_path / "cache" / "calibration"


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
    calibrate(config, FLOAT32, driven=True)
    assert scripted.measured == 5
    assert len(list(folder.iterdir())) == 5


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
        (lambda text: text.replace('"format": 2', '"format": 99'), "format is 99, not 2"),
        (lambda text: text.replace('"read_rate": 4', '"read_rate": 5'), "its SHA-256 is another"),
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
    "backend, driven, host_beside, link_beside",
    [
        ("cpu", False, 0, 0),
        ("cpu", True, 0, 0),
        ("gpu", False, 1, 1),
        ("gpu", True, 1, 1),
        ("tpu", False, 0, 1),
        ("tpu", True, 1, 1),
    ],
)
def test_curves_say_what_the_planner_needs(
    config, scripted, monkeypatch, backend, driven, host_beside, link_beside
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    curves = measure_costs(config, FLOAT32, driven=driven)
    assert curves.tokens.tolist() == list(SIZES)
    assert curves.host.tolist() == list(FOUND.host.seconds)
    assert curves.device.tolist() == list(FOUND.device.seconds)
    assert (curves.stream, curves.link_latency, curves.host_launch) == (0.5, 0.25, 0.125)
    assert curves.memory == 0.25
    assert (curves.host_beside, curves.link_beside) == (host_beside, link_beside)


def run_script(monkeypatch, *arguments):
    """What the script ends with: nothing if all went well."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(expert_timing, "SECONDS", 0.0)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_the_script_prints_a_table(tiny, monkeypatch, capsys):
    assert run_script(monkeypatch, tiny, "--dtype", "float32") is None
    printed = capsys.readouterr().out
    for text in ("embed 16, ffn 12, float32", "host memory  read at", "of limit", "stream ms"):
        assert text in printed
    assert [line.split()[0] for line in printed.splitlines() if line[:6].strip().isdigit()] == [
        str(size) for size in SIZES
    ]
    assert "* inferred from other counts" in printed
    slow = [line for line in printed.splitlines() if line.startswith("SLOW")]
    assert all("with 1 token(s)" in line for line in slow), "the others were not measured"


def test_the_script_times_experts_kept_in_8_bits(tiny, monkeypatch, capsys):
    assert run_script(monkeypatch, tiny, "--host-dtype", "int8") is None
    # 3 products of 16 by 12, and a scale for each of 2 * 12 + 16 rows.
    assert "bfloat16, int8 in host memory, 736 B;" in capsys.readouterr().out


def test_the_script_flags_a_slow_host_and_prints_json(tiny, scripted, monkeypatch, capsys):
    assert run_script(monkeypatch, tiny) is None
    # 1000 bytes in 4 s and more, where 4000 bytes per second could be read.
    assert "SLOW: with 1 token(s) the host reads weights at 6% of the read limit" in (
        capsys.readouterr().out
    )
    assert run_script(monkeypatch, tiny, "--json", "--again") is None
    result = json.loads(capsys.readouterr().out)
    assert scripted.measured == 2
    assert result["rows"][0]["host"] == 4.0 and result["rows"][0]["stream"] == 2.75


def test_the_script_draws(tiny, scripted, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run_script(monkeypatch, tiny, "--out", tmp_path / "curves.png") is None
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_script_names_the_extra_before_measuring(
    tiny, scripted, monkeypatch, tmp_path
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reason = run_script(monkeypatch, tiny, "--out", tmp_path / "curves.png")
    assert "pip install 'moe-jax[train]'" in reason
    assert scripted.measured == 0
