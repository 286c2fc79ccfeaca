"""Routing is recorded and replayed from a shell."""

import importlib
import json

import numpy as np
import pytest

import moe_jax
from moe_jax.placement.trace import make_trace, save_trace, uniform_trace
from tests.scripts.conftest import SCRIPTS


def trace_file(folder, experts: int) -> str:
    """A made-up trace of three steps, in a file."""
    trace = uniform_trace(steps=3, layers=2, experts=experts, experts_per_token=8)
    save_trace(trace, folder / "made_up.npz")
    return str(folder / "made_up.npz")


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
        (["--steps", "0"], "--steps is 0; choose 1 or more"),
        (["--sequences", "0"], "--sequences is 0; choose 1 or more"),
        (["--prompt", "-1"], "--prompt is -1; choose 0 or more"),
        (["--most-per-step", "-1"], "--most-per-step is -1; choose 0 or more"),
        (["--seed", "-1"], "--seed is -1; choose 0 or more"),
        (["--reserve-gb", "-3"], "--reserve-gb is -3.0; choose 0 or more"),
        (["--device-gb", "nan"], "--device-gb is nan; choose more than 0"),
        (["--locality", "2"], "--locality is 2.0; choose a probability, 0 to 1"),
    ],
)
def test_simulate_says_what_it_does_not_know(run, options, message):
    done = run("simulate.py", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "experts, advice", [(64, "name olmoe-1b-7b in --models"), (12, "record one of such a model")]
)
def test_a_trace_of_no_chosen_model_is_refused(run, tmp_path, experts, advice):
    done = run("simulate.py", "--trace", trace_file(tmp_path, experts))
    assert done.returncode == 2
    assert (
        f"the trace made_up has {experts} experts per layer, none of --models does; there are "
        f"8 (mixtral-8x7b), 128 (qwen3-30b-a3b), 64 (olmoe-1b-7b); {advice}"
    ) in done.stderr


@pytest.mark.parametrize(
    "paths, message",
    [
        (
            ["a/x.npz", "y.npz", "b/x.npz"],
            "the traces a/x.npz and b/x.npz are both called x; rename one",
        ),
        (["a/zipf.npz"], "the trace a/zipf.npz is called zipf as a made-up one is; rename it"),
    ],
)
def test_traces_of_one_name_are_refused_before_any_is_read(run, paths, message):
    done = run("simulate.py", "--trace", *paths)  # none of these files exists
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize("most, moves", [(["--most-per-step", "0"], False), ([], True)])
def test_olmoe_is_replayed_and_its_experts_stay_if_none_may_move(run, tmp_path, most, moves):
    options = ["--models", "olmoe-1b-7b", "--device-gb", "8", "--machines", "rtx4090"]
    options += ["--policies", "lru", "--steps", "3", "--trace", trace_file(tmp_path, 64)]
    done = run("simulate.py", *options, *most, "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["trace"] for row in rows} == {"zipf", "uniform", "made_up"}
    assert any(row["swaps"] for row in rows) is moves


@pytest.mark.parametrize(
    "options, message",
    [
        (["--text", "nothing.txt"], "[Errno 2] No such file or directory: 'nothing.txt'"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8: invalid start byte at byte 1"),
        (
            ["--text", "blank.txt"],
            "blank.txt is blank, nothing can be recorded on it; give another",
        ),
        (["--tokens", "0"], "--tokens is 0; choose 1 or more"),
        (["--tokens", "-5"], "--tokens is -5; choose 1 or more"),
        (["--prompt", "9", "--piece", "9"], "--prompt is 9; choose 0 or more, less than --piece"),
        (["--out", "trace.txt"], "--out is trace.txt; choose a name that ends in .npz"),
        (["--out", "blank.txt/trace.npz"], "[Errno 17] File exists: 'blank.txt'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_the_model_is_loaded(
    run, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("où".encode("latin-1") + b"!")
    (tmp_path / "blank.txt").write_text(" \n")
    monkeypatch.setattr(moe_jax, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    done = run("profile_experts.py", *options)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}")


def test_a_missing_checkpoint_is_an_error_in_words(run):
    done = run("profile_experts.py", "nowhere", "--out", "unused.npz")
    assert done.returncode == 1 and done.stderr.startswith("error: there is no folder nowhere;")


@pytest.mark.parametrize(
    "decoded, line",
    [
        (0, "does - of the work; - of a token's"),
        (1, "does 50% of the work; - of a token's"),
        (2, "does 50% of the work; 100% of a token's"),
    ],
)
def test_a_share_of_nothing_is_a_dash(monkeypatch, decoded, line):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    counts = np.tile([[1, 1, 0, 0]], (decoded + 1, 1, 1))
    trace = make_trace(counts, 2, prefill=np.arange(decoded + 1) == 0)
    assert line in importlib.import_module("profile_experts").describe(trace)
