"""The scripts run as the README shows them."""

import importlib
import json
import sys
import tempfile
from unittest.mock import Mock

import pytest

import moe_jax
from tests.scripts.conftest import SCRIPTS

COMMANDS = sorted({path.name for path in SCRIPTS.glob("*.py")} - {"command_line.py"})


@pytest.fixture
def end(monkeypatch):
    """What the interpreter is told when this is the outcome of a script's main."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def end(outcome):
        with pytest.raises(SystemExit) as raised:
            importlib.import_module("command_line").run(Mock(side_effect=[outcome]))
        return raised.value.code

    return end


@pytest.mark.parametrize(
    "outcome, code",
    [
        (None, None),
        (3, 3),
        (SystemExit("FAILS"), "FAILS"),
        (ValueError("--layers is 0"), "error: --layers is 0"),
        (FileNotFoundError(2, "No such file", "a"), "error: [Errno 2] No such file: 'a'"),
        (KeyboardInterrupt(), "\ninterrupted"),
    ],
)
def test_a_script_ends_with_its_own_code_or_one_line(end, outcome, code):
    assert end(outcome) == code


def test_a_defect_keeps_its_traceback(end):
    with pytest.raises(TypeError):
        end(TypeError())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_does(run, name):
    done = run(name, "--help")
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_generate_writes_text_through_the_offload_path(run):
    done = run("generate.py")
    assert done.returncode == 0, done.stderr
    assert "host" in done.stdout and len(done.stdout) > 200


def test_the_planner_is_timed(run):
    done = run("bench_planner.py", "--plans", "20", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| 128 | 8 |") == 4  # a plan, and all of a layer's dispatch


def test_a_step_is_shown_for_another_machine(run, tmp_path):
    done = run("timeline.py", "--machine", "rtx4090", "--tokens", "2")
    assert done.returncode == 0, done.stderr
    lanes = [line.split()[0] for line in done.stdout.splitlines()[-4:]]
    assert lanes == ["device", "link", "host", "memory"]


def test_a_timeline_is_drawn_into_a_new_folder(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "picture.svg"
    done = run("timeline.py", "--tokens", "1", "--layers", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert out.read_text().startswith("<?xml") and f"written to {out}" in done.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layers", "-3"], "--layers is -3; choose 1 or more"),
        (["--tokens", "0"], "--tokens is 0; choose 1 or more"),
        (["--out", "line.txt"], "--out is line.txt; choose a name that ends in one of"),
        (["--out", f"{__file__}/line.png"], f"[Errno 17] File exists: '{__file__}'"),
        (["--out", "line.png"], "drawing needs matplotlib, which is not installed: pip install"),
    ],
)
def test_a_timeline_is_refused_before_the_model_is_loaded(run, monkeypatch, options, message):
    if "--out" in options:
        pytest.importorskip("matplotlib")
    if "matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    monkeypatch.setattr(moe_jax, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    done = run("timeline.py", *options)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}")


def test_bench_measures_a_checkpoint_it_makes(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    shapes = importlib.import_module("random_checkpoint").SHAPES
    monkeypatch.setitem(shapes["mixtral_0.8b"], "num_hidden_layers", 2)
    out = tmp_path / "bench.json"
    small = ["--repeats", "1", "--prefill", "8", "--decode", "2", "--skip-transformers"]
    with tempfile.TemporaryDirectory() as folder:  # 0.5 GB, not to be kept as tmp_path is
        done = run("bench.py", "--checkpoint", folder, "--out", str(out), *small)
    assert done.returncode == 0, done.stderr
    row = json.loads(out.read_text())["rows"]["moe_jax"]
    assert row["prefill_tokens_per_second"] > 0 and row["share_of_read_limit"] > 0
    assert [len(runs) for runs in row["runs"].values()] == [1, 1]
    assert 0 <= json.loads(out.read_text())["decode_run_prediction_error"] < 100
    assert "| moe_jax |" in done.stdout
