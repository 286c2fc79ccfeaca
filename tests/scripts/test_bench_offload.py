"""The benchmark of a model that does not fit, tried in small on the CPU: not for speed."""

import heapq
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_offload
import random_checkpoint
from offload_bench import sizes, ways
from offload_bench.apart import Failure, run_apart
from offload_bench.table import offload_table
from offload_bench.task import PROMPT, Line, Task, rate, warm_up
from offload_bench.turns import take_turns

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
        needs = {"max_tokens": 2 * (PROMPT + 2) + 16, "max_seqs": 2}
        budget = budget or f"{device_memory_for(folder, experts=0.5, **needs)}"
        small = ["--shape", "tiny", "--layers", "2", "--device-memory", budget, "--repeats", "1"]
        small += ["--prefill", "8", "--decode", "2", "--beams", "2", "--checkpoint", str(folder)]
        out = tmp_path / "result.json"
        command = ["bench_offload.py", *small, "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        code = bench_offload.main()
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.fixture
def together(monkeypatch):
    """What is measured shares this process: jax is there, and the costs of experts are known."""

    def call(function, *arguments, seconds=None, seen=None):
        result = function(*arguments)
        if seen is None:
            return result
        for row in result:
            seen(row)

    monkeypatch.setattr(bench_offload, "run_apart", call)


@pytest.mark.usefixtures("together")
def test_a_way_is_measured_and_what_is_not_installed_is_said(start, monkeypatch, capsys):
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    code, result = start("--ways", "transformers", "plan")
    assert code == 0
    (row,) = result["rows"]
    lines = ["decode", "prefill 8", "2 beams"]
    assert row["way"] == "plan" and result["lines"] == list(row["tokens_per_second"]) == lines
    assert all(rate > 0 for rate in row["tokens_per_second"].values())
    assert row["slots"] == [2, 2] and row["predicted_at_load"] > 0
    assert row["decode_error"] is not None and row["decode_times"]["steps"] > 0
    # The only counted prefill is the first that compiled nothing: what corrects later predictions.
    assert row["predicted"]["decode"] > 0 and row["predicted"]["2 beams"] > 0
    (missing,) = result["not_measured"]
    assert missing["way"] == "transformers"
    assert missing["reason"].startswith("torch, transformers not installed; pip install torch")
    text = capsys.readouterr().out
    assert "plan: 2 beams: " in text and "| way | decode | prefill 8 | 2 beams |" in text
    assert "* transformers: torch, transformers not installed" in text


@pytest.mark.usefixtures("together")
def test_halves_of_experts_are_measured(start, tmp_path):
    needs = {"max_tokens": PROMPT + 2 + 16, "max_seqs": 1}
    budget = device_memory_for(tmp_path / "checkpoint", experts=0.5, expert_pieces=2, **needs)
    code, result = start("--ways", "halves", "--beams", budget=f"{budget}")
    assert code == 0
    (row,) = result["rows"]
    assert list(row["tokens_per_second"]) == ["decode", "prefill 8"] and row["slots"] == [4, 4]


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
    assert list(row["tokens_per_second"]) == result["lines"]
    assert all(rate > 0 for rate in row["tokens_per_second"].values())
    assert row["predicted"] == {} and row["predicted_at_load"] is None
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


def test_what_a_process_has_told_is_there_before_its_end():
    seen = []
    merged = heapq.merge  # a generator of a module that a new process imports in no time
    assert run_apart(merged, [0, 2], [1], seen=seen.append) == 2 and seen == [0, 1, 2]
    with pytest.raises(Failure, match="TypeError: '<' not supported"):
        run_apart(merged, [0, 2], [1, "x"], seen=seen.append)
    assert seen == [0, 1, 2, 0, 1]


# Turns


@pytest.fixture
def turns(monkeypatch):
    """Lets ways take turns by a clock of its own; a way takes so many seconds for each line."""

    def run(seconds, end, failing=(), extra=()):
        now, given, written = [0.0], {}, []
        monkeypatch.setattr("offload_bench.turns.time.monotonic", lambda: now[0])
        result = {"rows": [], "not_measured": []}

        def measure(way, limit, seen):
            given[way] = limit
            rates = {}
            for name in ("decode", "4 beams"):
                now[0] += seconds[way]
                if way in failing and rates:
                    raise Failure("it broke")
                rates[name] = 1.0
                seen({"way": way, "tokens_per_second": dict(rates), "predicted": {}, "stats": ""})

        write = lambda: written.append(len(result["rows"]))
        take_turns(list(seconds), extra, measure, end, result, write)
        return result, given, written

    return run


def test_each_way_gets_its_share_of_the_time_and_every_line_is_written(turns):
    result, given, written = turns({"plan": 5, "stream": 20, "host": 5, "fiddler": 5}, end=100)
    # The first may take all, the others their share, or as long as the slowest if that is more.
    assert given == {"plan": 100, "stream": 30, "host": 40, "fiddler": 40}
    assert written == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert [row["way"] for row in result["rows"]] == list(given)
    assert all(len(row["tokens_per_second"]) == 2 for row in result["rows"])
    assert turns({"plan": 5, "host": 5}, end=math.inf)[1] == {"plan": None, "host": None}


def test_other_forms_of_the_planner_get_what_is_left(turns):
    seconds = dict.fromkeys(("plan", "stream", "driven", "halves"), 5)
    _, given, _ = turns(seconds, end=100, extra=("driven", "halves"))
    assert given == {"plan": 100, "stream": 90, "driven": 40, "halves": 70}


def test_nothing_is_begun_that_would_not_get_to_its_first_line(turns, capsys):
    result, given, _ = turns({"plan": 20, "stream": 40, "host": 5}, end=125)
    assert list(given) == ["plan", "stream"]
    assert result["not_measured"] == [{"way": "host", "reason": "not begun, the time is over"}]
    assert "host: not measured: not begun" in capsys.readouterr().out


def test_what_a_way_measured_before_it_failed_stays(turns, capsys):
    result, _, written = turns({"plan": 5, "stream": 5}, end=math.inf, failing=("plan",))
    assert [list(row["tokens_per_second"]) for row in result["rows"]] == [
        ["decode"],
        ["decode", "4 beams"],
    ]
    assert result["not_measured"] == [{"way": "plan", "reason": "it broke"}]
    assert written == [1, 1, 2, 2, 2]
    assert "plan: not all of it measured: it broke" in capsys.readouterr().out


def test_a_long_line_is_not_repeated(tmp_path):
    task = Task(folder=tmp_path, vocab=9, prefill=(8,), decode=4, beams=(2,), repeats=3)
    runs = []

    def run(prompt, tokens, beams):
        runs.append((len(prompt), tokens, beams))
        return 4.0, 30.0

    decode, prefill, beams = task.lines
    assert rate(decode, task, run) == 4 / 30 and runs == [(PROMPT, 4, 1)]
    runs.clear()
    assert rate(prefill, task, run) == 8 / 4 and runs == 3 * [(8, 0, 1)]
    runs.clear()
    assert rate(beams, task, run) == 4 / 30 and runs == [(PROMPT, 4, 2)]
    runs.clear()
    for line in task.lines:
        warm_up(line, task, run)
    assert runs == [(PROMPT, 2, 1), (8, 0, 1), (PROMPT, 2, 2)]
    assert task.max_seqs == 2 and task.max_tokens == 2 * (PROMPT + 4) + 16


# Sizes

GB = 10**9
MIXTRAL = random_checkpoint.config_of("mixtral_8x7b")
MIXTRAL_SIZES = sizes.Sizes.of(MIXTRAL)
LINES = (Line(name="decode", prompt=16, decode=16), Line(name="prefill 4096", prompt=4096))


def layers_for(host=1000, device=24, disk=1000, seconds=None, ways=5, of=MIXTRAL_SIZES):
    limits = sizes.Limits(
        host_bytes=host * GB, device_bytes=device * GB, disk_bytes=disk * GB, seconds=seconds
    )
    return sizes.choose_layers(of, limits, ways, LINES, 2)


def test_layers_are_as_many_as_memory_disk_and_time_allow():
    assert layers_for() == (32, "the whole model")
    on_disk, why = layers_for(disk=64)
    assert 16 <= on_disk < 22 and why.startswith("free disk of 59.60 GiB")
    in_memory, why = layers_for(host=64)
    assert 16 <= in_memory < 22 and why.startswith("host memory of 59.60 GiB")
    assert layers_for(host=64, device=0)[0] < in_memory  # the device is the host
    assert MIXTRAL_SIZES.bytes_of(in_memory) < (0.7 * 64 + 24) * GB
    times = [layers_for(seconds=seconds)[0] for seconds in (500, 1000, 2000)]
    assert 2 < times[0] < times[1] < times[2] <= 32
    assert layers_for(seconds=1000, ways=1)[0] > times[1]


def test_two_layers_are_tried_in_no_time_but_not_in_no_memory():
    assert layers_for(seconds=1) == (2, "time of 1 s")
    with pytest.raises(ValueError, match=r"2 layers take 5.89 GiB, .* host memory of 3.73 GiB"):
        layers_for(host=4, seconds=1)
    assert layers_for(of=replace(MIXTRAL_SIZES, layers=1), seconds=1)[0] == 1


def test_the_bytes_are_those_of_the_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(random_checkpoint, "_POOL", 1 << 16)
    config = random_checkpoint._COMMON | TINY | {"num_hidden_layers": 3}
    random_checkpoint.write_checkpoint(tmp_path, config)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sizes.Sizes.of(config).bytes_of(3) == index["metadata"]["total_size"]


def test_the_budget_is_24_gb_unless_most_of_the_layers_fit_into_it(tmp_path, monkeypatch):
    task = Task(folder=tmp_path, vocab=9, prefill=(4096,), decode=16, beams=(4, 8, 16), repeats=2)
    asked = {}
    monkeypatch.setattr(
        sizes, "device_memory_for", lambda folder, experts, **needs: asked.update(part=experts) or 7
    )
    choose = lambda layers, device: sizes.choose_budget(
        MIXTRAL | {"num_hidden_layers": layers}, 32, task, device * GB
    )
    assert choose(32, 80) == choose(14, 80) == (24 * GB, "24 GB by default")
    assert choose(32, 16) == (16 * GB, "all that the device has")
    assert asked == {}
    budget, why = choose(4, 80)
    assert budget == 7 and why == "for 21% of the experts, as most of so few fit into 22.35 GiB"
    assert 0.2 < asked["part"] < 0.25


@pytest.mark.usefixtures("together")
def test_layers_and_budget_are_chosen_and_the_checkpoint_that_is_there_is_used(
    start, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bench_offload, "measure_way", lambda *arguments: None)
    monkeypatch.setattr(bench_offload, "take_turns", lambda *arguments: None)
    small = ["bench_offload.py", "--shape", "tiny", "--prefill", "8", "--decode", "2"]
    small += ["--beams", "2", "--seconds", "60"]
    for folder in ("checkpoint", "another"):
        command = [*small, "--checkpoint", str(tmp_path / folder), "--out"]
        monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / f"{folder}.json")])
        assert bench_offload.main() == 1  # nothing was measured
    there, chosen = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("checkpoint", "another")
    )
    assert there["layers_chosen_by"] == "the checkpoint that is there" and there["layers"] == 2
    assert chosen["layers_chosen_by"].startswith("time of 60 s") and chosen["layers"] == 2
    # A model that would fit as a whole is measured as one that does not.
    assert chosen["budget_chosen_by"].startswith("for 67% of the experts")


def test_the_table_compares_the_ways():
    row = {
        "tokens_per_second": {"decode": 30.0, "prefill 512": 1234.5, "4 beams": 20.0},
        "predicted": {"decode": 28.0, "prefill 512": None, "4 beams": 19.0},
        "predicted_at_load": 27.0,
        "decode_error": 0.1,
        "prefill_error": None,
    }
    bare = {"predicted": {}, "predicted_at_load": None, "decode_error": None}
    result = {
        "shape": "mixtral_8x7b",
        "layers": 16,
        "whole_layers": 32,
        "layers_chosen_by": "time of 1500 s",
        "device_memory": "22.35 GiB",
        "budget_chosen_by": "24 GB by default",
        "device": "H100",
        "date": "2026-01-31",
        "ways": ["plan", "stream", "transformers", "driven", "halves"],
        "lines": ["decode", "prefill 512", "4 beams"],
        "rows": [{"way": "plan"} | row,
                 {"way": "stream"} | row | {"tokens_per_second": {"decode": 15.0}},
                 {"way": "transformers"} | row | bare],
        "not_measured": [{"way": "stream", "reason": "stopped after 9 s, the time is over"},
                         {"way": "driven", "reason": "it broke"}],
    }  # fmt: skip
    lines = offload_table(result).splitlines()
    assert lines[0].startswith("mixtral_8x7b with 16 of 32 layers (time of 1500 s), 22.35 GiB on")
    assert lines[4] == "| plan | 30 (28) | 1234 | 20 (19) | 27 | 10%, ? |"
    assert lines[5] == "| stream | 15 (28) |  |  | 27 | 10%, ? |"
    assert lines[6] == "| transformers | 30 | 1234 | 20 |  | ?, ? |"
    assert "* decode: 2.00 x stream, 1.00 x transformers" in lines
    assert "* prefill 512: 1.00 x transformers" in lines
    # "halves" had not begun when the script was ended from outside.
    assert lines[-3:] == [
        "* stream: stopped after 9 s, the time is over; without prefill 512, 4 beams",
        "* driven: it broke",
        "* halves: not begun, the time is over",
    ]
