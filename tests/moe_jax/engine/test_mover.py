"""Experts that change places while text is written: the text stays the same."""

import dataclasses
import re
import signal

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.engine import runner as runner_module
from moe_jax.engine import swap as swap_module
from moe_jax.engine.sizing import device_memory_for
from moe_jax.engine.swap import swap_experts, violations
from moe_jax.placement.planner import plan_layer
from moe_jax.placement.policies import POLICIES
from tests.tolerances import assert_close

SIZES = {"dtype": "float32", "max_tokens": 128, "max_seqs": 2}
TOKENS = np.random.default_rng(6).integers(1, 300, 30)
PROMPTS = [TOKENS[:9].tolist(), TOKENS[9:12].tolist()]


def load(folder, policy, share=0.5, **options):
    budget = device_memory_for(folder, experts=share, **SIZES)
    engine = moe_jax.load(folder, device_memory=budget, residency=policy, **SIZES, **options)
    # A machine on which a miss costs a second and a swap next to nothing.
    model = engine._loop.runner.model
    slow = jnp.full_like(model.curves.host, 1.0)
    curves = dataclasses.replace(
        model.curves,
        host=slow,
        device=slow * 1e-3,
        stream=jnp.float32(0.9),
        memory=jnp.float32(0),
    )
    engine._loop.runner.model = dataclasses.replace(model, curves=curves)
    return engine


def greedy(engine):
    done = engine.generate(PROMPTS, max_tokens=40, ignore_eos=True)
    return [completion.tokens for completion in done]


def residents(engine):
    """Per layer, the experts in its slots, as the arrays say and as the mover believes."""
    layers = [layer.experts for layer in engine._loop.runner.model.layers]
    arrays = [
        [] if e is None else np.argsort(np.asarray(e.address))[: e.slots].tolist() for e in layers
    ]
    return arrays, [slots.tolist() for slots in engine._observer.mover.residency.slot_expert]


@pytest.fixture(scope="module")
def expected(tiny):
    engine = moe_jax.load(tiny, **SIZES)
    return greedy(engine), engine.logits(TOKENS)


@pytest.mark.parametrize("policy, share", [*((name, 0.5) for name in POLICIES), ("lfru", 0.25)])
def test_no_policy_changes_the_result(tiny, profile, expected, policy, share):
    """Nor does it matter which experts are resident at first."""
    placement = profile if share == 0.5 else "uniform"
    engine = load(tiny, policy, share, max_swaps=2, placement=placement)
    tokens, logits = expected
    for _ in range(2):
        assert greedy(engine) == tokens
        assert_close(engine.logits(TOKENS), logits)
    arrays, believed = residents(engine)
    assert arrays == believed
    for layer in engine._loop.runner.model.layers:
        assert layer.experts is None or violations(layer.experts) == []
    assert (engine.stats.swapped > 0) == (policy != "static")


def test_swaps_cost_bytes_and_raise_hits(tiny):
    still, moving = (load(tiny, policy, max_swaps=4) for policy in ("static", "lfru"))
    for engine in (still, moving):
        for _ in range(3):
            greedy(engine)
    assert moving.stats.hit_rate > still.stats.hit_rate
    swapped = moving.stats.swapped * moving.stats.expert_bytes
    assert moving.stats.bytes_streamed >= swapped > 0
    assert f"{moving.stats.swapped} swapped in" in str(moving.stats)


def test_no_swap_is_allowed(tiny):
    engine = load(tiny, "lru", max_swaps=0)
    greedy(engine)
    assert engine.stats.swapped == 0


def test_an_interrupt_during_a_swap_loses_nothing(tiny, expected, monkeypatch):
    engine = load(tiny, "lru", max_swaps=2)

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return swap_experts(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "swap_experts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            greedy(engine)
    assert engine.stats.swapped == 1
    arrays, believed = residents(engine)
    assert arrays == believed
    assert greedy(engine) == expected[0]


@pytest.mark.parametrize("layout, name", [("separate", "to_device"), ("bank", "store_expert")])
def test_a_swap_without_memory_ends_no_request(
    tiny, expected, layout, name, request, monkeypatch, caplog
):
    """It is logged, and swaps begin again after a while."""
    if layout == "bank":
        request.getfixturevalue("banks")
    engine = load(tiny, "lru", max_swaps=2)

    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(swap_module, name, full)
        assert greedy(engine) == expected[0]
    assert (engine.stats.failed_swaps, engine.stats.swapped) == (1, 0)
    assert "0 swapped in, 1 could not be | moved" in str(engine.stats)
    (record,) = caplog.records
    assert re.fullmatch(
        r"in layer \d expert \d could not replace expert \d, and both stay where they are; there "
        "are no swaps for 64 steps: RESOURCE_EXHAUSTED: Out of memory",
        record.getMessage(),
    )
    assert greedy(engine) == expected[0]
    assert engine.stats.swapped > 0
    arrays, believed = residents(engine)
    assert arrays == believed


def test_a_user_may_bring_a_planner_that_cannot_change_the_result(tiny, expected):
    def nonsense(counts, resident, curves):
        """Claims that nothing is to be done anywhere."""
        plan = plan_layer(counts, resident, curves)
        return dataclasses.replace(plan, mode=jnp.zeros_like(plan.mode))

    engine = load(tiny, "lfru", planner=nonsense)
    assert greedy(engine) == expected[0]
    assert engine.stats.streamed == 0 and engine.stats.hosted > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(residency="fifo"), "no policy is called 'fifo'; choose one of static, lru"),
        (dict(max_swaps=-1), "max_swaps must be a whole number of at least 0, got -1"),
    ],
)
def test_what_is_no_policy_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        moe_jax.load(tiny, **options)


def test_routing_is_recorded_step_by_step(tiny):
    engine = moe_jax.load(tiny, **SIZES)
    trace = engine.routing(TOKENS.tolist(), prompt_tokens=10)
    assert trace.prefill.tolist() == [True] + 20 * [False]
    assert trace.tokens.tolist() == [10] + 20 * [1]
    assert trace.layer.tolist() == [0, 2] and trace.experts_per_token == 2
    whole = engine.routing(TOKENS.tolist(), prompt_tokens=30)
    np.testing.assert_array_equal(whole.counts[0], trace.counts.sum(axis=0))
    np.testing.assert_allclose(whole.gates[0], trace.gates.sum(axis=0, dtype=np.float32), atol=0.02)
    with pytest.raises(
        ValueError, match="must lie between 0 and the 30 tokens of the text, got 31"
    ):
        engine.routing(TOKENS.tolist(), prompt_tokens=31)


def test_the_last_step_can_be_shown(tiny):
    budget = device_memory_for(tiny, experts=0.5, **SIZES)
    engine = moe_jax.load(tiny, device_memory=budget, missing_experts="host", **SIZES)
    with pytest.raises(ValueError, match="there is no step to show yet; generate something first"):
        engine.timeline()
    engine.generate(PROMPTS[0], max_tokens=3, ignore_eos=True)
    counts, resident = engine.last_routing()
    assert counts.sum(axis=1).tolist() == [2, 0, 2]
    assert resident.sum(axis=1).tolist() == [2, 0, 2]
    timeline = engine.timeline()
    lanes = [span.lane for span in timeline.spans if span.expert >= 0]
    assert lanes.count("device") + lanes.count("host") == 4 and "link" not in lanes
    assert [span.layer for span in timeline.spans if span.expert < 0] == [0, 1, 2]
    assert "host   |" in str(timeline)


def test_experts_change_places_where_misses_are_forced_to_the_host(tiny, expected):
    engine = load(tiny, "lru", missing_experts="host")
    assert np.isfinite(engine._observer.mover._costs.upload)
    assert greedy(engine) == expected[0]
    assert engine.stats.streamed == 0 and engine.stats.hosted > 0
