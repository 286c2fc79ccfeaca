"""Tuning, benchmark and GPU check, tried in small on the CPU: orchestration, not speed."""

# ruff: noqa: E402 - the scripts lie beside each other, not in a package
import json
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_kernels
import gpu_check
import tune
from kernel_bench import cases as kernel_cases
from kernel_bench import report as kernel_report
from kernel_bench import tiles as kernel_tiles
from kernel_bench import timing as kernel_timing

from pallas_kernels import tuning

TINY = {"paged_attention": "decode", "grouped_matmul": "down 4 "}
operations = pytest.mark.parametrize("operation", sorted(TINY))


@pytest.fixture
def start(monkeypatch):
    """Runs a script's main with these arguments, without the seconds that importing jax takes."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        return script.main()

    return run


def tiny_case(operation):
    return kernel_cases.cases(operation, TINY[operation], tiny=True)[0]


# Cases


@operations
def test_every_real_shape_has_cases_of_both_regimes_and_important_ones_come_first(operation):
    cases = kernel_cases.cases(operation)
    assert len({case.name for case in cases}) == len(cases)
    assert [case.rank for case in cases] == sorted(case.rank for case in cases)
    models = kernel_cases.EXPERTS if operation == "grouped_matmul" else kernel_cases.HEADS
    for model in models:
        assert {c.regime for c in cases if model in c.name} == {"decode", "prefill"}


def test_group_sizes_are_skewed_and_hold_every_choice_once():
    sizes = kernel_cases.skewed_group_sizes(0, 512, 64, 8)
    assert sizes.sum() == 512 * 8 and sizes.max() <= 512
    assert sizes.max() > 2 * np.median(sizes)
    np.testing.assert_array_equal(sizes, kernel_cases.skewed_group_sizes(0, 512, 64, 8))
    assert (sizes != kernel_cases.skewed_group_sizes(1, 512, 64, 8)).any()


def test_the_least_cost_of_a_product():
    (case,) = kernel_cases.cases("grouped_matmul", "mixtral_8x7b down 4096 tokens")
    rows, matrix = 2 * 4096, 4096 * 14336
    assert case.flops == 2 * rows * matrix
    assert case.bytes == 2 * (8 * matrix + rows * (4096 + 14336))
    assert case.goal == 0.7  # 1024 rows per expert


def test_the_least_cost_of_attention_counts_what_the_window_shows():
    full, window = (
        kernel_cases.cases("paged_attention", f"{name} decode 8 x 1 of 8192")[0]
        for name in ("gpt_oss_20b_full", "gpt_oss_20b")
    )
    position, queries = 2 * 8 * 64 * 2, 2 * 8 * 64 * 64 * 2
    assert window.bytes == 8 * 128 * position + queries
    assert window.flops == 4 * 64 * 64 * 8 * 128
    assert 0.9 * 8 * 8192 * position < full.bytes < 8 * 8192 * position + queries


def test_calls_read_pages_of_their_own():
    arrays = tiny_case("paged_attention").make()
    pages = np.concatenate([np.ravel(call["block_tables"]) for call in arrays.calls])
    assert len(arrays.calls) > 1 and len(set(pages)) == pages.size
    assert set(pages) == set(range(arrays.shared["key_pages"].shape[0]))


# Timing


def test_programs_are_timed_and_failures_have_a_reason():
    arrays = kernel_cases.Arrays({"x": jnp.ones((64, 64))}, [{"y": jnp.ones((64, 64))}] * 3)

    def broken(x, y):
        raise NotImplementedError("not on\nthis device")

    functions = {"add": lambda x, y: x + y, "broken": broken}
    programs = kernel_timing.compile_programs(functions, arrays, 2**30)
    assert programs["broken"] == "NotImplementedError: not on this device"
    timing = kernel_timing.measure(programs["add"], arrays, 0.001, 3)
    assert 0 < timing.seconds < 0.1 and timing.spread >= 0


def test_a_program_that_needs_too_much_memory_is_not_run():
    arrays = kernel_cases.Arrays({"x": jnp.ones((256, 256))}, [{}])
    programs = kernel_timing.compile_programs({"sort": lambda x: x @ jnp.sort(x)}, arrays, 1000)
    assert "GiB of temporary memory" in programs["sort"]


def test_difference_is_relative_and_nan_is_never_close():
    expected = jnp.array([1.0, -4.0])
    assert kernel_timing.difference(expected + jnp.array([0.0, 1.0]), expected) == 0.25
    assert kernel_timing.difference(jnp.array([jnp.nan, -4.0]), expected) == float("inf")


# Tuning


def test_neighbours_double_and_halve_and_leave_out_what_the_tiles_refuse():
    plan_of = tiny_case("grouped_matmul")
    tiles = kernel_tiles.plan(plan_of, plan_of.make(), "gpu", interpret=True).tiles
    near = list(kernel_tiles.neighbours(tiles, 1))
    assert tiles not in near and len(near) == len(set(near))
    assert {vars(n)["out"] for n in near} >= {2 * tiles.out, tiles.out // 2}
    assert {vars(n)["stages"] for n in near} == {tiles.stages + d for d in (-1, 0, 1)}
    assert min(vars(n)["rows"] for n in near) >= 16
    changes = [sum(vars(n)[f] != vars(tiles)[f] for f in vars(n)) for n in near]
    assert set(changes) == {1}


@operations
def test_tune_writes_a_table_that_the_kernel_then_uses(operation, start, tmp_path, monkeypatch):
    case = tiny_case(operation)
    table = tmp_path / operation / "tiles" / tuning.table_name("gpu", tuning.device_kind())
    kernel_report.write_json(table, {"entries": {"another case": {"tiles": {"rows": 16}}}})
    small = ["--seconds", 60, "--candidates", 3, "--sample-seconds", 0.001]
    code = start(tune, "--interpret", "--operation", operation, "--shapes", TINY[operation],
                 "--out", tmp_path, *small)  # fmt: skip
    assert code == 0

    # The table is where the package would look for it.
    monkeypatch.setattr(tuning, "files", lambda package: tmp_path)
    tuning.read_table.cache_clear()
    entries = tuning.read_table(operation, table.name)
    plan = kernel_tiles.plan(case, case.make(), "gpu", interpret=True)
    tuning.read_table.cache_clear()
    assert plan.measured and vars(plan.tiles) == entries[plan.key]["tiles"]
    assert entries["another case"] == {"tiles": {"rows": 16}}
    trials = entries[plan.key]["trials"]
    assert len(trials) == 3 and all("microseconds" in t or t["refused"] for t in trials)
    best = min(t["microseconds"] for t in trials if "microseconds" in t)
    assert 0 < best <= entries[plan.key]["microseconds"]
    assert json.loads(table.read_text())["jax"] == jax.__version__
    assert not list(tmp_path.rglob("*.part"))


def test_a_candidate_with_wrong_results_is_refused(monkeypatch):
    arguments = tune.argparse.Namespace(
        seconds=60, candidates=6, interpret=True, workers=1, sample_seconds=0.001
    )
    case, made = tiny_case("grouped_matmul"), kernel_tiles.plan

    def lying(*positional, **named):
        plan = made(*positional, **named)
        # The first tiles are believed; all others are off by a quarter.
        run = lambda tiles, **call: plan.run(tiles, **call) * (1 if tiles == plan.tiles else 1.25)
        return kernel_tiles.dataclasses.replace(plan, run=run)

    monkeypatch.setattr(kernel_tiles, "plan", lying)
    _, entry = tune.Tuner(arguments, "gpu").tune(case)
    assert all("differs from the first tiles" in t["refused"] for t in entry["trials"][1:])
    assert entry["tiles"] == entry["trials"][0]["tiles"]


def test_tune_and_bench_refuse_a_cpu_by_name(start, capsys):
    for script in (tune, bench_kernels):
        assert start(script) == 2
        assert "on the backend 'cpu': it needs a GPU or a TPU" in " ".join(
            capsys.readouterr().err.split()
        )


def test_a_file_that_is_no_table_is_left_alone(tmp_path):
    path = tmp_path / "gpu_cpu.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"gpu_cpu.json is not a table .*; move it away"):
        tune.merge_into_table(path, "key", {})
    assert path.read_text() == "[]"


# Benchmark


@operations
def test_bench_compares_and_says_what_did_not_run(operation, start, tmp_path, capsys):
    out = tmp_path / "bench.json"
    small = ["--tiny", "--operation", operation, "--sample-seconds", 0.001, "--out", out]
    assert start(bench_kernels, *small, "--shapes", TINY[operation]) == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert row["microseconds"] > 0 and not row["measured"] and row["tiles"]
    alternatives = {entry["name"]: entry for entry in row["alternatives"]}
    assert alternatives["xla"]["microseconds"] > 0
    if operation == "grouped_matmul":
        assert alternatives["jax.lax.ragged_dot"]["microseconds"] > 0
    assert row["times_as_fast"] == row["fastest_alternative"]["microseconds"] / row["microseconds"]
    assert row["share"] == row["bound_microseconds"] / row["microseconds"]
    assert "| guessed |" in capsys.readouterr().out


def test_bench_goes_on_past_what_ended_the_process(start, tmp_path, capsys):
    out = tmp_path / "bench.json"
    small = ["--tiny", "--operation", "grouped_matmul", "--shapes", "down", "--sample-seconds"]
    small += [0.001, "--out", out, "--resume"]
    first, second = (case.name for case in kernel_cases.cases("grouped_matmul", "down", tiny=True))
    state = {"rows": [], "skipped": [], "broken": {"jax.lax.ragged_dot": "ended the process"}}
    kernel_report.write_json(out, state | {"running": {"case": first, "name": "ours"}})
    assert start(bench_kernels, *small) == 0
    result = json.loads(out.read_text())
    assert result["skipped"] == [{"case": first, "reason": f"ours ended the process in {first}"}]
    assert [row["case"] for row in result["rows"]] == [second]
    text = capsys.readouterr().out
    assert "jax.lax.ragged_dot: DeviceLost: ended the process" in text
    assert f"* {first}: ours ended the process" in text


def test_a_lost_device_ends_the_process_and_is_remembered(start, tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(bench_kernels, "measure", broken)
    monkeypatch.setattr(bench_kernels, "healthy", lambda: False)
    out = tmp_path / "bench.json"
    small = ["--tiny", "--operation", "grouped_matmul", "--shapes", "down 4 ", "--out", out]
    assert start(bench_kernels, *small) == 3
    assert "xla broke the device in tiny down 4 tokens" in capsys.readouterr().err
    assert json.loads(out.read_text())["running"]["name"] == "xla"


# The one command


def python_part(name, code, **options):
    return gpu_check.Part(name=name, command=[sys.executable, "-c", code], weight=1, **options)


def test_no_part_can_end_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "_GRACE_SECONDS", 1)
    mark = str(tmp_path / "mark")
    parts = [
        python_part("crash", "import os; print('so far', flush=True); os.abort()"),
        python_part("hang", "import time; print('sleeping', flush=True); time.sleep(1000)"),
        gpu_check.Part(name="missing", command=[str(tmp_path / "nothing")], weight=1),
        python_part("refusal", "import sys; sys.exit('no such shape')"),
        python_part(
            "second try",
            f"import pathlib, sys; mark = pathlib.Path({mark!r}); mark.exists() and sys.exit(0)\n"
            "mark.touch(); sys.exit(3)",
            resume=["--resume"],
        ),
        python_part("good", "print('µs 1.5')", log=tmp_path / "good.log"),
    ]
    seen = []
    start = time.monotonic()
    outcomes = gpu_check.run_parts(parts, start + 12, lambda done: seen.append(len(done)))
    assert time.monotonic() - start < 12
    problems = {outcome.name: outcome.problem for outcome in outcomes}
    assert problems["crash"] == "signal 6: so far"
    assert problems["hang"].startswith("stopped after")
    assert problems["missing"].startswith("FileNotFoundError")
    assert problems["refusal"] == "exit code 1: no such shape"
    assert problems["second try"].startswith("exit code 3")
    assert problems["second try, again"] is None and problems["good"] is None
    assert seen == [1, 2, 3, 4, 6, 7]
    assert (tmp_path / "good.log").read_text() == "µs 1.5\n"

    result = {"benchmarks": {}, "versions": {"jax": "1"}, "device": "GPU", "date": "today"}
    text = gpu_check.report(outcomes, result | {"command": "python gpu_check.py"})
    assert "| crash | signal 6: so far |" in text and "| good | ok |" in text
    assert "No benchmark of paged_attention came back." in text


def test_an_interrupt_ends_the_part_that_runs(monkeypatch):
    started = []

    def interrupted(process, timeout):
        started.append(process)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check.subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.run_part(python_part("endless", "import time; time.sleep(1000)"), 60)
    assert started[0].returncode == -signal.SIGKILL


def test_without_a_gpu_it_says_what_is_missing(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "find_device", lambda: ("cpu", "cpu"))
    assert start(gpu_check, "--out", tmp_path / "out") == 2
    assert "needs an NVIDIA GPU that jax can use; it found cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_are_chosen_by_kind_and_options_passed_on(tmp_path):
    plan = lambda *more: gpu_check.plan_parts(tmp_path, tmp_path, False, *more)
    assert [part.name for part in plan()] == [
        "tests",
        *(
            f"{kind} {operation}"
            for kind in ("tune", "bench")
            for operation in gpu_check.OPERATIONS
        ),
        "orchestration",
    ]
    assert [part.name.split()[0] for part in plan(["bench", "tests"])] == ["tests"] + 2 * ["bench"]
    (part,) = plan(["orchestration"], ["--layers", "8", "--device-memory", "9GB"])
    assert part.command[-4:] == ["--layers", "8", "--device-memory", "9GB"]
    # What is not asked for is chosen by the script: all ways, and layers for the time.
    (part,) = plan(["orchestration"])
    assert "--layers" not in part.command and "--ways" not in part.command


def test_the_report_names_what_there_was_no_time_for():
    measured = {
        "shape": "tiny", "layers": 2, "whole_layers": 4, "layers_chosen_by": "time of 9 s",
        "device_memory": "1 GiB", "budget_chosen_by": "24 GB by default", "device": "GPU",
        "date": "today", "ways": ["plan", "stream"], "lines": ["decode"], "not_measured": [],
        "rows": [{"way": "plan", "tokens_per_second": {"decode": 2.0}, "predicted": {},
                  "predicted_at_load": 1.0, "decode_error": None, "prefill_error": None}],
    }  # fmt: skip
    result = {"benchmarks": {}, "versions": {"jax": "1"}, "device": "GPU", "date": "today"}
    result |= {"command": "python gpu_check.py", "asked": ["orchestration"]}
    text = gpu_check.report([], result | {"orchestration": measured})
    assert "| plan | 2 |" in text and "* stream: not begun, the time is over" in text
    assert "With more time: `--only orchestration --minutes 25`" in text
    assert "No benchmark" not in text
    assert "No result of the orchestration came back." in gpu_check.report([], result)


def test_the_whole_command_in_small(start, tmp_path, capsys):
    code = start(gpu_check, "--out", tmp_path, "--dry-run", "--minutes", 4)
    assert code == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [part["problem"] for part in result["parts"]] == [None] * 6
    assert set(result["benchmarks"]) == set(TINY)
    assert all(benchmark["rows"] for benchmark in result["benchmarks"].values())
    assert len(result["tables"]) == 2 and all((tmp_path / t).exists() for t in result["tables"])
    text = (tmp_path / "gpu_check.md").read_text()
    assert "## paged_attention" in text and "| tiny down 4 tokens |" in text
    assert "## orchestration" in text and "| host |" in text
    (row,) = result["orchestration"]["rows"]
    assert row["way"] == "host" and list(row["tokens_per_second"])[-1] == "2 beams"
    assert "passed" in (tmp_path / "tests.log").read_text()
    assert len(list(tmp_path.iterdir())) == 5  # a report in two forms, two operations, a log
