"""The benchmark refuses arguments before it works, and its table says what cannot be."""

import sys

import pytest

from tests.scripts.conftest import SCRIPTS

sys.path.insert(0, str(SCRIPTS))

import bench


@pytest.mark.parametrize(
    "options, message",
    [
        (["--missing-experts", "disk"], "--missing-experts is disk; choose one of auto, stream"),
        (["--repeats", "0"], "--repeats is 0; choose 1 or more"),
        (["--decode", "-1"], "--decode is -1; choose 1 or more"),
        (["--prefill", "0"], "--prefill is 0; choose 1 or more"),
        (["--device-memory", "much"], "a memory size must be a number of bytes or text like"),
        (["--out", "{folder}/none/a.json"], "--out is {folder}/none/a.json, in no folder that"),
        (["--out", "{folder}"], "--out is {folder}, a folder; choose a file in it"),
    ],
)
def test_wrong_arguments_are_refused_before_a_checkpoint_is_made(run, tmp_path, options, message):
    options = [option.format(folder=tmp_path) for option in options]
    done = run("bench.py", "--checkpoint", str(tmp_path / "checkpoint"), *options)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message.format(folder=tmp_path)}")
    assert not list(tmp_path.iterdir())


def test_a_share_above_the_limit_says_why():
    row = {
        "prefill_tokens_per_second": 100.0,
        "share_of_product_limit": 0.5,
        "decode_tokens_per_second": 10.0,
        "decode_bytes_per_second": 1e10,
        "share_of_read_limit": 1.05,
    }
    result = {
        "shape": "tiny",
        "machine": "a machine",
        "versions": {"jax": "1"},
        "date": "today",
        "read_bytes_per_second": 1e10,
        "bytes_per_token": 1 << 20,
        "product_operations_per_second": 1e12,
        "experts_alone": {"bytes_per_second": 1e10, "share_of_read_limit": 1.0},
        "prediction_error": {"prefill": None, "decode": None},
        "decode_run_prediction_error": None,
        "rows": {"moe_jax": row, "other": row | {"share_of_read_limit": 1.64}},
    }
    lines = bench.table(result).splitlines()
    assert "| moe_jax | 100 | 50% | 10.0 | 10.0 | 105% |" in lines
    above = "164%, above the limit: it was taken in a slower moment"
    assert f"| other | 100 | 50% | 10.0 | 10.0 | {above} |" in lines
