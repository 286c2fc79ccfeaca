"""The benchmark of requests that run together, tried in small: not for speed."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import bench_engine
import random_checkpoint
from engine_bench.comparing import Row, Sizes

SMALL = Sizes(
    together=2,
    prompt=8,
    tokens=24,
    beams=(2,),
    beam_tokens=3,
    long_prompt=20,
    decoding=1,
    running=2,
    shared=16,
    lookup=3,
    lookup_tokens=12,
    repeats=1,
)
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 64,
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A random checkpoint with one layer of four experts."""
    monkeypatch.setattr(random_checkpoint, "_POOL", 1 << 16)
    config = random_checkpoint.config_of("mixtral_0.8b") | SHAPE
    random_checkpoint.write_checkpoint(tmp_path / "tiny", config)
    return tmp_path / "tiny"


def test_every_measure_of_a_checkpoint(folder, monkeypatch):
    engine = bench_engine.load(folder, "host", SMALL)
    assert engine.plan.memory.slots == (0,)
    # All kinds of engine have two seats here; one is enough, most of the time is compilation.
    monkeypatch.setattr(bench_engine, "load", lambda folder, where, sizes: engine)
    rows = bench_engine.measure({"tiny": folder}, list(bench_engine.MEASURES), SMALL)
    assert [row.measure for _, row in rows] == [
        "2 requests together",
        "prompt of 20 beside 1 that decode",
        "first token, 16 shared tokens (16 from the cache)",
        "prompt lookup, 3 drafts",
        "step of 2 beams",
        "scheduling of 2 that run",
        "scheduling of 2 that run, 2 wait",
    ]
    for _, row in rows:
        numbers = [row.result, *row.measured.values()]
        assert all(math.isfinite(number) and number > 0 for number in numbers), row
    _, prefill = rows[1]
    assert prefill.result == 1 and prefill.reached
    assert all(model == "tiny" for model, _ in rows)


@pytest.mark.parametrize(
    "at_least, result, reached", [(True, 4.0, True), (True, 3.9, False), (False, 4.1, False)]
)
def test_the_table_says_what_was_reached(at_least, result, reached):
    row = Row("batching", {"alone ms": 1.25}, result, target=4.0, at_least=at_least)
    assert row.reached is reached
    entry = {"model": "tiny", "reached": row.reached, **vars(row)}
    text = bench_engine.table(
        {"machine": "a CPU", "versions": {"jax": "0"}, "date": "2026-01-31", "rows": [entry]}
    )
    sign, state = ">=" if at_least else "<=", "reached" if reached else "missed"
    line = f"| batching | tiny | alone ms 1.25 | {result:.3g} x | {sign} 4: {state} |"
    assert text.splitlines()[-1] == line
