"""scripts/evaluate.py as a user calls it."""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.engine.load import reference_model_folder


@pytest.fixture
def evaluate(run):
    return lambda *arguments: run("evaluate.py", *arguments)


def test_results_are_printed_and_written_and_a_requirement_can_fail(evaluate, tmp_path):
    table, file = tmp_path / "table.md", tmp_path / "results.json"
    limits = "copying=1.01,drift=1,perplexity=2"
    done = evaluate("--quick", "--tasks", "drift,copying,perplexity", "--require", limits,
               "--markdown", str(table), "--json", str(file))  # fmt: skip
    assert done.returncode == 1 and "FAILS: copying is" in done.stderr, done.stderr
    assert "FAILS: perplexity is" in done.stderr and "drift is" not in done.stderr
    assert done.stdout == table.read_text()
    assert "| copying | all |" in done.stdout and "8 questions" in done.stdout
    results = json.loads(file.read_text())
    assert results["arguments"]["quick"] and results["arguments"]["host_dtype"] is None
    assert [row["task"] for row in results["results"]] == ["drift", "copying", "perplexity"]


def test_the_quick_form_is_a_gate_for_the_embedded_model(evaluate, tmp_path):
    done = evaluate("--quick", "--tasks", "drift")
    assert done.returncode == 0 and "| drift | all | 0.0" in done.stdout, done.stderr
    shutil.copytree(reference_model_folder(), tmp_path / "damaged")
    file = tmp_path / "damaged" / "model-00001-of-00002.safetensors"
    tensors = load_file(file)
    (expert,) = (name for name in tensors if name.endswith("layers.1.mlp.experts.3.up_proj.weight"))
    save_file({**tensors, expert: 0 * tensors[expert]}, file, metadata={"format": "pt"})
    done = evaluate(
        "--model", str(file.parent), "--quick", "--tasks", "drift", "--require", "drift=0.02"
    )
    assert done.returncode == 1 and "FAILS: drift is 0.0" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "recall,sums"], "no task 'sums'"),
        (["--require", "recall=lots"], "got 'recall=lots'"),
        (["--require", "sums=1"], "names 'sums'"),
        (["--tasks", "recall", "--require", "passkey=1"], "names passkey, which is not in --tasks"),
        (["--model", "nowhere"], "nowhere"),
        (["--json", "nowhere/results.json"], "there is no folder nowhere"),
        (["--record", "nowhere/record.safetensors"], "there is no folder nowhere"),
        (["--stride", "2000"], "stride must be between 1 and context"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_line(evaluate, arguments, message):
    done = evaluate(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
