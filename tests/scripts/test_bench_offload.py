"""The benchmark of a model that does not fit, tried in small on the CPU: not for speed."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_offload
import random_checkpoint
from kernel_bench.report import offload_table
from offload_bench import ways
from offload_bench.apart import Failure, run_apart

from moe_jax.engine.sizing import device_memory_for

TINY = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "rope_theta": 1e4,
    "sliding_window": None,
}


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Runs the script on a tiny checkpoint, half of whose experts fit; returns code and result."""
    monkeypatch.setitem(random_checkpoint.SHAPES, "tiny", TINY)
    monkeypatch.setattr(random_checkpoint, "_POOL", 1 << 16)
    folder = tmp_path / "checkpoint"
    config = random_checkpoint.config_of("tiny") | {"num_hidden_layers": 2}
    random_checkpoint.write_checkpoint(folder, config)

    def run(*arguments, budget=None):
        sizes = {"max_tokens": 2 * (ways.PROMPT + 2) + 16, "max_seqs": 2}
        budget = budget or f"{device_memory_for(folder, experts=0.5, **sizes)}"
        small = ["--shape", "tiny", "--layers", "2", "--device-memory", budget, "--repeats", "1"]
        small += ["--prefill", "8", "--decode", "2", "--beams", "2", "--checkpoint", str(folder)]
        out = tmp_path / "result.json"
        command = ["bench_offload.py", *small, "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        code = bench_offload.main()
        return code, json.loads(out.read_text())

    return run


@pytest.fixture
def together(monkeypatch):
    """What is measured shares this process: jax is there, and the costs of experts are known."""
    call = lambda function, *arguments, seconds=None: function(*arguments)
    monkeypatch.setattr(bench_offload, "run_apart", call)


@pytest.mark.usefixtures("together")
def test_a_way_is_measured_and_what_is_not_installed_is_said(start, monkeypatch, capsys):
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    code, result = start("--ways", "transformers", "plan")
    assert code == 0
    (row,) = result["rows"]
    assert row["way"] == "plan" and row["decode_tokens_per_second"] > 0
    assert list(row["beams_tokens_per_second"]) == ["2"]
    assert list(row["prefill_tokens_per_second"]) == ["8"]
    assert row["slots"] == [2, 2]
    assert row["decode_error"] is not None and row["decode_times"]["steps"] > 0
    (missing,) = result["not_measured"]
    assert missing["way"] == "transformers"
    assert missing["reason"].startswith("torch, transformers not installed; pip install torch")
    text = capsys.readouterr().out
    assert "| 2 together | prefill 8 |" in text
    assert "* transformers: torch, transformers not installed" in text


@pytest.mark.usefixtures("together")
def test_halves_of_experts_are_measured(start, tmp_path):
    sizes = {"max_tokens": 2 * (ways.PROMPT + 2) + 16, "max_seqs": 2}
    budget = device_memory_for(tmp_path / "checkpoint", experts=0.5, expert_pieces=2, **sizes)
    code, result = start("--ways", "halves", budget=f"{budget}")
    assert code == 0
    (row,) = result["rows"]
    assert row["decode_tokens_per_second"] > 0 and row["slots"] == [4, 4]


def test_an_engine_that_fails_is_no_result(start, capsys):
    code, result = start("--ways", "host", budget="1kB")
    assert code == 1 and result["rows"] == []
    assert result["not_measured"][0]["reason"].startswith("ValueError: the device budget of 1000 B")
    assert "* host: ValueError" in capsys.readouterr().out


@pytest.mark.golden
def test_transformers_runs_the_same_tokens(start):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    code, result = start("--ways", "transformers")
    assert code == 0 and result["not_measured"] == []
    (row,) = result["rows"]
    assert row["decode_tokens_per_second"] > 0 and row["beams_tokens_per_second"]["2"] > 0
    assert row["predicted_tokens_per_second"] is None
    assert set(row["versions"]) == {"torch", "transformers"}
    assert "everything on the CPU" in row["stats"]


@pytest.mark.parametrize(
    "platform, installed, text",
    [
        ("cpu", {"torch", "transformers"}, None),
        ("cpu", {"torch"}, "transformers not installed; pip install transformers"),
        ("gpu", {"torch", "transformers"}, "accelerate not installed; pip install accelerate"),
        ("gpu", {"torch", "transformers", "accelerate"}, None),
        ("tpu", {"torch", "transformers"}, "made on CPUs and GPUs, and jax runs on tpu"),
    ],
)
def test_what_transformers_needs(platform, installed, text, monkeypatch):
    monkeypatch.setattr(ways, "find_spec", lambda name: name if name in installed else None)
    reason = ways.why_not_transformers(platform)
    assert (reason is None) if text is None else text in reason


def test_a_process_of_its_own_gives_its_result_or_the_reason():
    assert run_apart(divmod, 7, 2) == (3, 1)
    with pytest.raises(Failure, match="ValueError: invalid literal for int"):
        run_apart(int, "seven")
    with pytest.raises(Failure, match="its process ended with code 3"):
        run_apart(os._exit, 3)
    with pytest.raises(Failure, match="stopped after 0 s, the time is over"):
        run_apart(time.sleep, 60, seconds=0.2)


def test_nothing_is_begun_when_the_time_is_over(monkeypatch, capsys):
    given = []

    def measure_way(way, task, platform, seconds):
        given.append(seconds)
        return {"way": way, "stats": ""}

    monkeypatch.setattr(bench_offload, "measure_way", measure_way)
    result = {"rows": [], "not_measured": []}
    arguments = SimpleNamespace(ways=["plan", "host", "stream"], seconds=10.0, out=None)
    bench_offload.measure_ways(arguments, None, "cpu", result, time.monotonic())
    assert given[0] is None and all(0 < seconds < 10 for seconds in given[1:])
    late = {"rows": [], "not_measured": []}
    bench_offload.measure_ways(arguments, None, "cpu", late, time.monotonic() - 11)
    assert [row["way"] for row in late["rows"]] == ["plan"]
    assert [(e["way"], e["reason"]) for e in late["not_measured"]] == [
        (way, "not begun, the time is over") for way in ("host", "stream")
    ]


def test_the_table_compares_the_ways():
    row = {
        "decode_tokens_per_second": 30.0,
        "predicted_tokens_per_second": 28.0,
        "decode_error": 0.1,
        "prefill_error": None,
        "beams_tokens_per_second": {"4": 90.0},
        "prefill_tokens_per_second": {"512": 1234.5},
    }
    none = {"predicted_tokens_per_second": None, "decode_error": None}
    result = {
        "shape": "mixtral_8x7b",
        "layers": 4,
        "device_memory": "4GB",
        "device": "H100",
        "date": "2026-01-31",
        "rows": [{"way": "plan"} | row,
                 {"way": "transformers"} | row | none | {"decode_tokens_per_second": 3.0}],
        "not_measured": [{"way": "stream", "reason": "not begun, the time is over"}],
    }  # fmt: skip
    lines = offload_table(result).splitlines()
    assert lines[2].endswith("mispredicted by | 4 together | prefill 512 |")
    assert lines[4] == "| plan | 30 | 28 | 10%, ? | 90 | 1234 |"
    assert lines[5] == "| transformers | 3 |  | ?, ? | 90 | 1234 |"
    assert "Decode of one sequence, plan: 10.00 x transformers." in lines
    assert lines[-1] == "* stream: not begun, the time is over"
