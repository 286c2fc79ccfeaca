"""Where experts are and how they run changes neither logits nor tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax.engine import load as load_module
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.sizing import device_memory_for
from moe_jax.model.experts import ExpertBank
from moe_jax.placement.forced import force
from moe_jax.placement.planner import Mode, plan_layer
from moe_jax.placement.rules import host_all, stream_all
from tests.tolerances import assert_close

SIZES = {"dtype": "float32", "max_tokens": 64, "max_seqs": 3}
TOKENS = np.random.default_rng(1).integers(1, 300, (2, 20))
PROMPT = TOKENS[0, :9].tolist()
MODES = ("auto", "stream", "host", "mixed")


def load(folder, share, **options):
    budget = device_memory_for(folder, experts=share, **SIZES)
    return moe_jax.load(folder, device_memory=budget, **SIZES, **options)


def greedy(engine):
    return engine.generate(PROMPT, max_tokens=16, ignore_eos=True).tokens


def executions(engine):
    s = engine.stats
    return np.array([s.resident, s.streamed, s.hosted])


@pytest.fixture(scope="module")
def curves(tiny):
    """The costs that each value of missing_experts gives, and some that split the experts."""
    measured = load(tiny, 0.0)._loop.runner.model.curves
    found = {mode: force(measured, mode) for mode in MODES[:3]}
    even = jnp.full_like(found["auto"].host, 1.0)
    found["mixed"] = dataclasses.replace(
        found["auto"],
        host=even,
        stream=jnp.float32(1),
        device=even * 1e-3,
        host_beside=jnp.float32(1),
        link_beside=jnp.float32(1),
    )
    return found


@pytest.fixture(scope="module", params=[0.5, 0.25, 0.0], ids=["half", "one_per_layer", "none"])
def offloaded(request, tiny):
    engine = load(tiny, request.param, planner=plan_layer)  # ready for costs that a test gives
    slots = int(4 * request.param)
    assert engine.plan.memory.slots == (slots, 0, slots)
    return engine


@pytest.fixture(scope="module")
def everything_resident(engine):
    assert engine.plan.memory.slots == (4, 0, 4)
    before = executions(engine)
    logits, tokens = engine.logits(TOKENS), greedy(engine)
    return logits, tokens, executions(engine) - before


@pytest.mark.parametrize("mode", MODES)
def test_logits_and_tokens_do_not_depend_on_placement(offloaded, everything_resident, curves, mode):
    expected_logits, expected_tokens, all_resident = everything_resident
    runner = offloaded._loop.runner
    runner.model = dataclasses.replace(runner.model, curves=curves[mode])
    before = executions(offloaded)
    assert_close(offloaded.logits(TOKENS), expected_logits)
    assert greedy(offloaded) == expected_tokens
    resident, streamed, hosted = executions(offloaded) - before

    assert all_resident[1:].tolist() == [0, 0]
    assert resident + streamed + hosted == all_resident[0]
    assert (resident > 0) == (offloaded.plan.memory.resident_experts > 0)
    assert (streamed > 0) == {"stream": True, "mixed": True, "host": False}.get(mode, streamed > 0)
    assert (hosted > 0) == {"stream": False, "mixed": True, "host": True}.get(mode, hosted > 0)
    assert streamed + hosted > 0


@pytest.mark.parametrize("executor", ["compiled", "driven"])
@pytest.mark.parametrize("missing, planner", [("stream", host_all), ("host", stream_all)])
def test_what_is_forced_holds_for_planners_that_want_the_other_way(
    tiny, everything_resident, missing, planner, executor
):
    engine = load(tiny, 0.5, missing_experts=missing, planner=planner, executor=executor)
    before = executions(engine)
    assert greedy(engine) == everything_resident[1]
    _, streamed, hosted = executions(engine) - before
    assert (streamed > 0, hosted > 0) == (missing == "stream", missing == "host")
    assert np.isfinite(engine.plan.tokens_per_second) and engine.plan.tokens_per_second > 0


@pytest.mark.parametrize("transfer, can_pay", [(0.5, True), (2.0, False)])
def test_programs_can_stream_where_that_can_pay(
    tiny, everything_resident, curves, monkeypatch, transfer, can_pay
):
    """Where not, costs of another machine change nothing: nothing was compiled for it."""
    serial = {"host_beside": jnp.float32(0), "link_beside": jnp.float32(0)}
    costs = dataclasses.replace(curves["mixed"], stream=jnp.float32(transfer), **serial)
    monkeypatch.setattr(load_module, "measure_costs", lambda *_, **__: costs)
    engine = load(tiny, 0.5)
    runner = engine._loop.runner
    runner.model = dataclasses.replace(runner.model, curves=curves["stream"])
    before = executions(engine)
    assert greedy(engine) == everything_resident[1]
    _, streamed, hosted = executions(engine) - before
    assert (streamed > 0, hosted > 0) == (can_pay, not can_pay)


def looks(counts, resident, curves):
    return plan_layer(counts, resident, curves) if counts[0] > 0 else None


def invents(counts, resident, curves):
    plan = plan_layer(counts, resident, curves)
    return dataclasses.replace(plan, mode=plan.mode + len(Mode))


@pytest.mark.parametrize(
    "planner, text",
    [
        ("fiddler", "'fiddler' raised TypeError"),
        (looks, "looks .* raised TracerBoolConversionError"),
        (lambda *_: None, "returns a LayerPlan; .* returned None"),
        (invents, r"its modes must be one Mode \(0 to 3\) for each of 4 experts"),
    ],
    ids=["name", "looks", "none", "invents"],
)
def test_a_planner_is_tried_before_weights_are_read(tiny, planner, text):
    with pytest.raises(ValueError, match=text):
        load(tiny, 0.5, planner=planner)


def test_nothing_is_prefetched_where_experts_stay_on_the_host(tiny):
    options = {"missing_experts": "host", "executor": "driven"}
    with pytest.raises(ValueError, match="prefetch=True brings experts to the device"):
        load(tiny, 0.5, prefetch=True, **options)


@pytest.mark.usefixtures("banks")
def test_a_bank_of_resident_experts_gives_the_same(tiny, everything_resident, engine):
    banked = load(tiny, 0.5)
    assert isinstance(banked._loop.runner.model.layers[0].experts.resident, ExpertBank)
    assert_close(banked.logits(TOKENS[0]), everything_resident[0][0])
    stored, expected = (arrays_by_target(e._loop.runner.model) for e in (banked, engine))
    assert stored.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


@pytest.mark.parametrize("share, resident", [(1.0, 8), (0.5, 4), (0.4, 3), (0.25, 2), (0.0, 0)])
def test_budgets_keep_the_share_that_was_asked_for(tiny, share, resident):
    budget = device_memory_for(tiny, experts=share, **SIZES)
    plan = moe_jax.load(tiny, device_memory=budget, **SIZES).plan
    assert plan.memory.resident_experts == resident
    assert plan.memory.device_bytes_used <= budget
    smaller = moe_jax.load(tiny, device_memory=budget - 1, **SIZES) if share else None
    assert smaller is None or smaller.plan.memory.resident_experts < resident


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_shares_lie_between_0_and_1(tiny, share):
    with pytest.raises(ValueError, match="experts is a share between 0 and 1"):
        device_memory_for(tiny, experts=share)
