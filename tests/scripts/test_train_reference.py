"""scripts/train_reference.py: a run in small, stopped and taken up again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.flax import load_file

pytest.importorskip("optax", reason="needs the train extra")

import moe_jax
from moe_jax.evaluate.corpus import read_library, split_documents

SMALL = {"vocab": 400, "embed": 32, "layers": 2, "heads": 2, "head-dim": 16, "ffn": 16}


@pytest.fixture
def train(run):
    return lambda *arguments: run("train_reference.py", *arguments)


@pytest.fixture
def steps(train):
    """The steps that a run reports."""

    def steps(*arguments: str) -> list[dict]:
        done = train(*arguments)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step"')]

    return steps


@pytest.fixture
def corpus(tmp_path) -> Path:
    training, held_out = split_documents(read_library())
    for document in [*training[100:140], *held_out[:2]]:
        path = tmp_path / "library" / document.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text)
    return tmp_path / "library"


def test_a_stopped_run_goes_on_and_what_it_writes_can_be_loaded(corpus, tmp_path, train, steps):
    sizes = [part for name, value in SMALL.items() for part in (f"--{name}", str(value))]
    common = ["--corpus", str(corpus), "--tokens", "1024", "--report-every", "1", *sizes]
    common += ["--save-every", "2", "--out", str(tmp_path / "out")]
    first = steps(*common, "--steps", "3")
    assert [line["step"] for line in first] == [1, 2, 3]
    assert "held_out_bits_per_byte" in first[1] and "held_out_bits_per_byte" in first[2]
    shutil.rmtree(tmp_path / "out" / "states" / "3")
    again = steps(*common, "--steps", "3")
    assert [line["step"] for line in again] == [3]
    same = ("training_bits_per_byte", "answer_nats", "held_out_bits_per_byte")
    assert [again[0][name] for name in same] == [first[2][name] for name in same]
    assert steps(*common, "--steps", "3") == []
    settings, *lines = (tmp_path / "out" / "training.jsonl").read_text().splitlines()
    assert "settings" in json.loads(settings)
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    other = train(*common, "--seed", "1")
    assert other.returncode == 1 and "was begun with --seed 0, not 1" in other.stderr
    mean = ["--start-from", str(tmp_path / "out"), str(tmp_path / "out"), "--steps", "0"]
    assert steps(*common[:-1], str(tmp_path / "mean"), *mean) == []
    of_both, of_one = (
        load_file(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("mean", "out")
    )
    assert all(np.array_equal(of_both[name], tensor) for name, tensor in of_one.items())
    engine = moe_jax.load(tmp_path / "out", progress=False)
    assert engine.config.vocab == 400 and engine.generate("def f(", max_tokens=3).tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--out", "x", "--steps", "0"],
            "--steps 0 trains nothing; give 1 or more, or --start-from",
        ),
        (["--pack", "x.tar.xz"], "--pack packs the folders of --corpus"),
        (["--evaluate", "x", "--corpus", "a", "b"], "--corpus takes several folders only with"),
        (["--curve", "x.png"], "--curve draws a log; name it with --log"),
    ],
)
def test_options_that_do_not_go_together_are_refused(train, arguments, message):
    done = train(*arguments)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
