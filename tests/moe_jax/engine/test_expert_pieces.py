"""Engines whose experts were cut along ffn: device and host can share one, the results stay."""

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.checkpoint import expected_targets
from moe_jax.config import MoEConfig
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.cut import cut_array, join_arrays
from moe_jax.engine.sizing import device_memory_for
from moe_jax.model.ops import gated_ffn
from moe_jax.placement.planner import Mode
from tests.moe_jax.engine.conftest import share_evenly
from tests.tolerances import assert_close

PIECES = {"expert_pieces": 2}
SIZES = {"dtype": "float32", "max_tokens": 128, "max_seqs": 2}
TOKENS = np.random.default_rng(8).integers(1, 300, 28)
PROMPTS = [TOKENS[:9].tolist(), TOKENS[9:13].tolist()]


def load(folder, share, **options):
    """An engine that, unless it must do otherwise, streams every other missing piece."""
    budget = device_memory_for(folder, experts=share, **SIZES, **PIECES)
    engine = moe_jax.load(folder, device_memory=budget, **PIECES, **SIZES, **options)
    if options.get("missing_experts", "auto") == "auto":
        share_evenly(engine)
    return engine


def everything(engine):
    done = engine.generate(PROMPTS, max_tokens=12, ignore_eos=True)
    return engine.logits(TOKENS), [(one.tokens, one.logprobs) for one in done]


@pytest.fixture(scope="module")
def expected(tiny):
    return everything(load(tiny, 1.0))


def assert_same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[1] == expected[1]


def test_whole_experts_say_the_same_but_for_rounding(engine, expected):
    assert_close(expected[0], engine.logits(TOKENS))
    done = engine.generate(PROMPTS, max_tokens=12, ignore_eos=True)
    assert [one.tokens for one in done] == [tokens for tokens, _ in expected[1]]


@pytest.mark.parametrize(
    "share, missing",
    [(0.5, "auto"), (0.4, "auto"), (0.4, "stream"), (0.4, "host"), (0.0, "auto")],
)
def test_it_does_not_matter_where_pieces_are(tiny, expected, share, missing):
    engine = load(tiny, share, missing_experts=missing)
    assert engine.plan.memory.resident_experts == int(16 * share)
    assert_same(everything(engine), expected)
    streamed, hosted = engine.stats.streamed, engine.stats.hosted
    assert (streamed > 0) == (missing != "host") and (hosted > 0) == (missing != "stream")


def test_device_and_host_share_an_expert(tiny):
    """Where an odd number of experts miss, half of one is streamed; in some step, one does."""
    engine = load(tiny, 0.5)
    reports = engine._loop.runner.take_reports
    cut = []
    for token in TOKENS[:8].tolist():
        engine.generate([token], max_tokens=2, ignore_eos=True)
        report, _ = engine._observer.last_step()
        by_expert = np.asarray(report.tally.modes).reshape(-1, 2)
        cut.append((by_expert == [Mode.STREAM, Mode.HOST]).all(axis=1).sum())
        assert not (by_expert == [Mode.HOST, Mode.STREAM]).all(axis=1).any()
    assert max(cut) > 0 and not reports()
    shown = engine.timeline()
    assert {span.expert for span in shown.spans} <= set(range(-1, 4))


@pytest.mark.parametrize(
    "options",
    [{"residency": "lfru", "max_swaps": 3}, {"executor": "driven", "prefetch": True}],
    ids=["moving", "driven"],
)
def test_pieces_move_and_are_driven_like_experts(tiny, expected, options):
    engine = load(tiny, 0.5, **options)
    for _ in range(2):
        logits, done = everything(engine)
        assert_close(logits, expected[0])
        assert [tokens for tokens, _ in done] == [tokens for tokens, _ in expected[1]]
    assert (engine.stats.swapped > 0) == ("residency" in options)


def test_pieces_are_saved_as_whole_experts(tiny, engine, tmp_path):
    cut = load(tiny, 0.4)
    stored = arrays_by_target(cut._loop.runner.model)
    plain = arrays_by_target(engine._loop.runner.model)
    assert set(stored) == set(plain) == set(expected_targets(engine.config))
    assert len(stored) == len(plain)
    for name, array in plain.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)
    cut.save(tmp_path / "saved")
    for pieces in (1, 2):
        again = moe_jax.load(tmp_path / "saved", expert_pieces=pieces, **SIZES)
        assert_close(again.logits(TOKENS), engine.logits(TOKENS))
        assert again.config == engine.config


def test_traces_and_profiles_are_of_whole_experts(tiny, engine, profile):
    cut = load(tiny, 0.5, placement=profile)
    slots = [slots.tolist() for slots in cut._observer.mover.residency.slot_expert]
    assert [sorted(row) for row in slots] == [[2, 3, 6, 7], [], [4, 5, 6, 7]]
    found, plain = (e.routing(TOKENS.tolist(), prompt_tokens=20) for e in (cut, engine))
    np.testing.assert_array_equal(found.counts, plain.counts)
    np.testing.assert_allclose(found.gates, plain.gates, rtol=1e-5)
    assert found.experts_per_token == plain.experts_per_token == 2


def test_int8_pieces_have_scales_of_their_own(tiny, engine):
    cut = load(tiny, 0.0, host_dtype="int8")
    assert_close(cut.logits(TOKENS), engine.logits(TOKENS), "bfloat16")
    whole = engine._loop.runner.model.layers[0].experts.resident[1]
    for half in (0, 1):
        columns = np.asarray(whole.down)[:, 6 * half : 6 * half + 6]
        piece = cut._loop.runner.model.layers[0].experts.host[2 + half]
        np.testing.assert_allclose(piece.down_scale, abs(columns).max(axis=1) / 127, rtol=1e-6)


@pytest.mark.usefixtures("banks")
def test_a_bank_holds_pieces_too(tiny, expected, engine):
    """Half of an expert in its last slot."""
    banked = load(tiny, 0.4)
    assert banked._loop.runner.model.layers[2].experts.resident.gate_up.shape[0] == 3
    assert_close(banked.logits(TOKENS), expected[0])
    stored = arrays_by_target(banked._loop.runner.model)
    for name, array in arrays_by_target(engine._loop.runner.model).items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_the_plan_says_so(tiny):
    plan = str(load(tiny, 0.5).plan)
    assert "4 experts in 2 pieces each (top-2)" in plan and "4 of 8 pieces resident" in plan


@pytest.mark.parametrize(
    "pieces, message",
    [
        (5, "expert_pieces=5: experts of ffn 12 cannot be cut into as many equal pieces"),
        (0, "expert_pieces must be a whole number of at least 1, got 0"),
        (True, "expert_pieces must be a whole number of at least 1, got True"),
    ],
)
def test_cuts_that_cannot_be_made_are_refused(tiny, pieces, message):
    with pytest.raises(ValueError, match=message):
        moe_jax.load(tiny, expert_pieces=pieces, **SIZES)


def test_the_router_knows_no_pieces():
    cut = MoEConfig(num_experts=8, experts_per_token=2, ffn=12).cut(2).cut(3)
    assert (cut.num_experts, cut.experts_per_token, cut.ffn, cut.pieces) == (48, 12, 2, 6)
    assert (cut.routed_experts, cut.routed_per_token) == (8, 2)


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_pieces_put_out_parts_of_a_sum(pieces):
    rng = np.random.default_rng(9)
    gate_up, down, x = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((24, 5), (5, 12), (3, 5))
    )
    cut = [cut_array("gate_up", gate_up, pieces), cut_array("down", down, pieces)]
    run = lambda *arrays: gated_ffn(*map(jnp.asarray, (*arrays, x)), "silu")
    put_out = [run(*piece) for piece in zip(*cut, strict=True)]
    assert_close(sum(put_out[1:], put_out[0]), run(gate_up, down))
    for part, arrays in zip(("gate_up", "down"), cut, strict=True):
        whole = {"gate_up": gate_up, "down": down}[part]
        np.testing.assert_array_equal(join_arrays(part, arrays), whole)
