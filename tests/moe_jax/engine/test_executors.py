"""Engines whose layers are driven from Python: chosen by name, with the same results."""

import jax
import numpy as np
import pytest

import moe_jax
from host_offload import memory
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.sizing import device_memory_for
from moe_jax.engine.swap import violations
from moe_jax.model.driven import DrivenProgram
from tests.moe_jax.engine.conftest import share_evenly

SIZES = {"dtype": "float32", "max_tokens": 64, "max_seqs": 2}
TOKENS = np.random.default_rng(7).integers(1, 300, 28)
PROMPTS = [TOKENS[:9].tolist(), TOKENS[9:13].tolist()]


def load_half(folder, **options):
    """Half of the experts resident, on a machine where host and link share the others."""
    budget = device_memory_for(folder, experts=0.5, **SIZES)
    engine = moe_jax.load(folder, device_memory=budget, progress=False, **SIZES, **options)
    share_evenly(engine)
    return engine


def everything(engine):
    done = engine.generate(PROMPTS, max_tokens=12, ignore_eos=True)
    return engine.logits(TOKENS), [(one.tokens, one.logprobs) for one in done]


@pytest.fixture(scope="module")
def driven(tiny):
    return load_half(tiny, executor="driven")


@pytest.fixture(scope="module")
def expected(tiny):
    return everything(load_half(tiny))


def test_text_and_logits_are_the_same_to_the_bit(driven, expected):
    assert isinstance(driven._loop.runner.model.layers[0].program, DrivenProgram)
    before = driven.stats
    logits, done = everything(driven)
    np.testing.assert_array_equal(logits, expected[0])
    assert done == expected[1]
    spent = driven.stats.since(before)
    assert spent.resident and spent.streamed and spent.hosted


def test_nothing_is_compiled_twice(driven):
    everything(driven)
    traces = driven.stats.traces
    everything(driven)
    assert driven.stats.traces == traces
    assert set(traces.values()) == {1}


def test_experts_change_places(driven, expected):
    for layer, incoming, outgoing in ((0, 3, 0), (2, 2, 1), (0, 0, 1)):
        driven._loop.runner.swap(layer, incoming, outgoing)
        assert violations(driven._loop.runner.model.layers[layer].experts) == []
        np.testing.assert_allclose(
            driven.logits(TOKENS), expected[0], atol=1e-5 * abs(expected[0]).max()
        )


def test_driven_experts_lie_in_the_memory_of_the_cpu(driven, tiny, engine):
    for layer in driven._loop.runner.model.layers:
        for expert in layer.experts.host if layer.experts else ():
            for array in expert:
                assert array.devices() == {jax.local_devices(backend="cpu")[0]}
                assert array.sharding.memory_kind == "pinned_host"
    stored, plain = (arrays_by_target(e._loop.runner.model) for e in (driven, engine))
    for name, array in plain.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_only_known_executors_are_accepted(tiny):
    with pytest.raises(ValueError, match="executor must be 'compiled' or 'driven', got 'python'"):
        moe_jax.load(tiny, executor="python", **SIZES)


def test_driven_needs_the_cpu_backend(tiny, monkeypatch):
    def absent(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(memory.jax, "local_devices", absent)
    with pytest.raises(ValueError, match="started without its CPU backend; add cpu to the env"):
        moe_jax.load(tiny, executor="driven", **SIZES)


def test_only_driven_layers_prefetch(tiny, driven):
    with pytest.raises(ValueError, match="prefetch=True needs executor='driven', got 'compiled'"):
        moe_jax.load(tiny, prefetch=True, **SIZES)
    assert not driven._loop.runner.programs.prefetcher.on  # not asked for, and this is a CPU
    ahead = moe_jax.load(tiny, executor="driven", prefetch=True, **SIZES)
    assert ahead._loop.runner.programs.prefetcher.on
    ahead._loop.runner.programs.prefetcher.begun, ahead._loop.runner.programs.prefetcher.useful = (
        5,
        3,
    )
    assert "5 prefetched, 3 of use" in str(ahead.stats)
    assert ahead.stats.bytes_streamed == 5 * ahead.stats.expert_bytes
    assert "prefetched" not in str(driven.stats)
