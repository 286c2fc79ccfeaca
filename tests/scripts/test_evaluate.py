"""scripts/evaluate.py as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_results_are_printed_and_written_and_a_requirement_can_fail(tmp_path):
    table, file = tmp_path / "table.md", tmp_path / "results.json"
    limits = "recall=1.01,copying=0,perplexity=2"
    done = run("--quick", "--tasks", "copying,recall,perplexity", "--require", limits,
               "--markdown", str(table), "--json", str(file))  # fmt: skip
    assert done.returncode == 1 and "FAILS: recall is" in done.stderr, done.stderr
    assert "FAILS: perplexity is" in done.stderr and "copying is" not in done.stderr
    assert done.stdout == table.read_text()
    assert "| recall | all |" in done.stdout and "24 questions" in done.stdout
    results = json.loads(file.read_text())
    assert results["arguments"]["quick"] and results["arguments"]["host_dtype"] is None
    assert [row["task"] for row in results["results"]] == ["copying", "recall", "perplexity"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "recall,sums"], "no task 'sums'"),
        (["--require", "recall=lots"], "got 'recall=lots'"),
        (["--require", "sums=1"], "names 'sums'"),
        (["--tasks", "recall", "--require", "passkey=1"], "names passkey, which is not in --tasks"),
        (["--model", "nowhere"], "nowhere"),
        (["--json", "nowhere/results.json"], "there is no folder nowhere"),
        (["--stride", "2000"], "stride must be between 1 and context"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
