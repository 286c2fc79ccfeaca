"""Routing is recorded and replayed from a shell."""

import json

import pytest


def test_a_recorded_trace_can_be_simulated(run, tmp_path):
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
def test_simulate_says_what_it_does_not_know(run, options, message):
    done = run("simulate.py", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
