"""The scripts run from a shell, as the README shows them."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", [path.name for path in sorted(SCRIPTS.glob("*.py"))])
def test_help_says_what_it_does(name):
    done = run(name, "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_generate_writes_text_through_the_offload_path():
    done = run("generate.py")
    assert done.returncode == 0, done.stderr
    assert "host" in done.stdout and len(done.stdout) > 200


def test_the_planner_is_timed():
    done = run("bench_planner.py", "--plans", "20", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| 128 | 8 |") == 4  # a plan, and all of a layer's dispatch


def test_a_recorded_trace_can_be_simulated(tmp_path):
    trace, out = tmp_path / "routing.npz", tmp_path / "result.json"
    done = run("profile_experts.py", "--tokens", "40", "--piece", "30", "--prompt", "8",
               "--out", str(trace))  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Two pieces: a prompt and 22 tokens, a prompt and 2.
    assert "26 steps (2 of prompts), 6 layers with 8 experts, top-2" in done.stdout
    small = ["--machines", "rtx4090", "--policies", "static", "lru", "--models", "mixtral-8x7b"]
    small += ["--pieces", "1", "2"]
    done = run("simulate.py", "--steps", "5", "--trace", str(trace), "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["policy"] for row in rows} >= {"static", "lru"}
    assert any("routing" in str(row.values()) for row in rows)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--machines", "abacus"], "abacus"),
        (["--policies", "fifo"], "no policy is called 'fifo'"),
        (["--trace", "nothing.npz"], "nothing.npz"),
    ],
)
def test_simulate_says_what_it_does_not_know(options, message):
    done = run("simulate.py", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_step_is_shown_for_another_machine(tmp_path):
    done = run("timeline.py", "--machine", "rtx4090", "--tokens", "2")
    assert done.returncode == 0, done.stderr
    lanes = [line.split()[0] for line in done.stdout.splitlines()[-4:]]
    assert lanes == ["device", "link", "host", "memory"]


def test_bench_measures_a_checkpoint_it_makes(tmp_path):
    out = tmp_path / "bench.json"
    small = ["--repeats", "1", "--prefill", "8", "--decode", "2", "--skip-transformers"]
    with tempfile.TemporaryDirectory() as folder:  # 1.5 GB, not to be kept as tmp_path is
        done = run("bench.py", "--checkpoint", folder, "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())["rows"]["moe_jax"]
    assert row["prefill_tokens_per_second"] > 0 and row["share_of_read_limit"] > 0
    assert "| moe_jax |" in done.stdout
