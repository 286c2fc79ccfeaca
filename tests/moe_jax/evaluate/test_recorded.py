import numpy as np
import pytest

import moe_jax
from moe_jax.evaluate.recorded import drift, make_record, read_record, write_record
from tests.moe_jax.evaluate.conftest import OPTIONS


def test_an_engine_does_not_drift_from_itself(engine, text, tmp_path):
    record = make_record(engine, [text[:10], text[:64], text[100:200]], positions=64)
    assert record.tokens.shape == (2, 64) and record.nats.shape == (2, 63)
    write_record(tmp_path / "record.safetensors", record)
    kept = read_record(tmp_path / "record.safetensors")
    np.testing.assert_array_equal(kept.tokens, record.tokens)
    assert drift(engine, kept) < 1e-6


def test_scores_that_rise_and_fall_do_not_cancel(engine, text):
    record = make_record(engine, [text[:65]], positions=65)
    record.nats[0, ::2] += 0.5
    record.nats[0, 1::2] -= 0.5
    assert drift(engine, record) == pytest.approx(0.5, abs=1e-6)


def test_short_texts_are_refused(engine, text):
    with pytest.raises(ValueError, match="no text has 64 tokens; give longer ones, or ask for few"):
        make_record(engine, [text[:63]], positions=64)


def test_rounding_drifts_less_than_damage(engine, damaged):
    record = read_record()
    assert drift(engine, record) < 0.001
    assert drift(moe_jax.load(**OPTIONS | {"dtype": "bfloat16"}), record) < 0.015
    without = lambda name, tensor: 0 * tensor if ".layers.4.mlp.experts.6." in name else tensor
    assert drift(moe_jax.load(damaged(without), **OPTIONS), record) > 0.03
