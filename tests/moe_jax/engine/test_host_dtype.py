"""Experts kept in int8 in host memory."""

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for
from moe_jax.evaluate.compression import target_nats
from moe_jax.evaluate.corpus import read_library, split_documents
from moe_jax.model.int8 import Int8Expert, int8_bytes

SIZES = {"dtype": "float32", "max_tokens": 64, "max_seqs": 3}
PROMPT = np.random.default_rng(1).integers(1, 300, 20).tolist()


def load(folder, share, **options):
    budget = device_memory_for(folder, experts=share, **SIZES)
    return moe_jax.load(folder, device_memory=budget, **SIZES, **options)


def error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_logits_are_near_those_of_the_model_whichever_way_its_experts_run(tiny, engine):
    expected = engine.logits(PROMPT)
    hosted = load(tiny, 0.5, host_dtype="int8", missing_experts="host")
    logits = hosted.logits(PROMPT)
    assert 1e-4 < error(logits, expected) < 0.05
    streamed = load(tiny, 0.5, host_dtype="int8", missing_experts="stream")
    np.testing.assert_allclose(streamed.logits(PROMPT), logits, rtol=1e-4, atol=1e-4)
    assert streamed.stats.streamed > 0 and hosted.stats.hosted > 0
    tokens = hosted.generate(PROMPT, max_tokens=8, ignore_eos=True).tokens
    assert streamed.generate(PROMPT, max_tokens=8, ignore_eos=True).tokens == tokens


def test_they_take_their_own_bytes(tiny):
    engine = load(tiny, 0.5, host_dtype="int8")
    size = int8_bytes(((24, 16), (16, 12)))
    memory = engine.plan.memory
    assert memory.host_expert_bytes == size == 24 * 16 + 16 * 12 + 4 * (24 + 16)
    assert f"{memory.host_experts} of 8, {size} B each" in str(engine.plan)
    layer = engine._loop.runner.model.layers[0].experts
    assert all(sum(part.nbytes for part in expert) == size for expert in layer.host)
    assert all(isinstance(expert, Int8Expert) for expert in layer.host)
    assert all(part.dtype == np.float32 for expert in layer.resident for part in expert)
    engine.logits(PROMPT)
    assert engine.stats.bytes_hosted == engine.stats.hosted * size


def test_a_budget_that_float_experts_exceed_can_hold_them(tiny):
    budget = 8 * int8_bytes(((24, 16), (16, 12)))
    with pytest.raises(ValueError, match="host budget"):
        load(tiny, 0.0, host_memory=budget)
    load(tiny, 0.0, host_memory=budget, host_dtype="int8")


def test_what_cannot_be_done_with_them_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="host_dtype must be None or 'int8', got 'int4'"):
        load(tiny, 0.5, host_dtype="int4")
    with pytest.raises(ValueError, match=r"cannot change places.*got residency='lru'.*'static'"):
        load(tiny, 0.5, host_dtype="int8", residency="lru")
    engine = load(tiny, 0.5, host_dtype="int8")
    with pytest.raises(ValueError, match="expert 3 was rounded to int8"):
        engine._loop.runner.swap(0, incoming=3, outgoing=0)
    with pytest.raises(ValueError, match=r"rounded to int8 cannot be saved.*without host_dtype="):
        engine.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_reference_model_hardly_notices():
    held_out = split_documents(read_library())[1]
    document = next(document for document in held_out if document.size > 4000)
    logits = {}
    for host_dtype in (None, "int8"):
        options = {"max_tokens": 300, "max_seqs": 1}
        budget = device_memory_for(reference_model_folder(), experts=0.0, **options)
        engine = moe_jax.load(device_memory=budget, host_dtype=host_dtype, **options)
        tokens = engine.tokenizer.encode(document.text)[:257]
        logits[host_dtype] = jnp.asarray(engine.logits(tokens[:-1]))
    targets = jnp.asarray([tokens[1:]])
    nats = {k: target_nats(x[None], targets).sum() for k, x in logits.items()}
    assert nats["int8"] < 1.01 * nats[None]
    same = logits["int8"].argmax(axis=1) == logits[None].argmax(axis=1)
    assert 0.95 < same.mean() < 1


def test_either_executor_gives_the_same_logits(tiny):
    compiled = load(tiny, 0.5, host_dtype="int8", missing_experts="host")
    driven = load(tiny, 0.5, host_dtype="int8", missing_experts="host", executor="driven")
    (layer, *_) = driven._loop.runner.model.layers
    kinds = {part.sharding.memory_kind for expert in layer.experts.host for part in expert}
    assert kinds == {"pinned_host"}
    np.testing.assert_allclose(driven.logits(PROMPT), compiled.logits(PROMPT), rtol=1e-5, atol=1e-5)
