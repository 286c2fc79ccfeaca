from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.placement.caches import belady, cache_residents, hit_rate
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.machines import MACHINES, curves_for, expert_bytes
from moe_jax.placement.pieces import Pieces
from moe_jax.placement.planner import plan_layer
from moe_jax.placement.policies import POLICIES, LeastFrequentlyUsed
from moe_jax.placement.rules import fiddler, host_all, stream_all
from moe_jax.placement.simulate import (
    Oracle,
    Simulation,
    find_oracle,
    simulate,
    uniform_slots,
)
from moe_jax.placement.trace import make_trace, uniform_trace, zipf_trace

EXPERTS, LAYERS = 16, 3
CURVES = curves_for(MACHINES["rtx4090"], 2048, 768)
BYTES = expert_bytes(2048, 768, 2)
SIZES = dict(steps=30, layers=LAYERS, experts=EXPERTS, experts_per_token=4)
TRACE = zipf_trace(**SIZES, locality=0.6, prompt=40, seed=1)
SLOTS = (6, 5, 5)


def make_curves(host=4.0, device=1.0, stream=2.0, memory=0.0):
    scalar = jnp.float32
    return CostCurves(
        tokens=jnp.array([1.0, 2.0]),
        host=jnp.full(2, host, jnp.float32),
        device=jnp.full(2, device, jnp.float32),
        stream=scalar(stream),
        host_launch=scalar(0),
        link_latency=scalar(0),
        memory=scalar(memory),
    )


def events(*used, experts):
    """A trace of one layer: the experts of each step."""
    counts = np.zeros((len(used), 1, experts), np.int64)
    for step, chosen in enumerate(used):
        counts[step, 0, list(chosen)] = 1
    return make_trace(counts, len(used[0]))


def hits(trace, resident):
    return ((trace.counts > 0) & resident).sum((1, 2)).tolist()


#: one expert a step, two slots, 0 and 1 at the start
ONE_BY_ONE = [[0], [2], [0], [1], [0], [2], [2], [1]]


@pytest.mark.parametrize(
    "policy, expected",
    [
        # 01 | 0 hit | 2 for 1 | 0 hit | 1 for 2 | 0 hit | 2 for 1 | 2 hit | 1 for 0
        ("lru", [1, 0, 1, 0, 1, 0, 1, 0]),
        # uses so far decide, and a newcomer with fewer than all residents passes by:
        # 2 (1) for 1 (0); 1 (1) against 2 (1): stays out; 2 is there
        (LeastFrequentlyUsed(half_life=np.inf), [1, 0, 1, 0, 1, 1, 1, 0]),
        ("static", [1, 0, 1, 1, 1, 0, 0, 1]),
    ],
)
def test_hits_worked_by_hand(policy, expected):
    trace = events(*ONE_BY_ONE, experts=3)
    assert hits(trace, cache_residents(trace, (2,), policy)) == expected


def test_belady_worked_by_hand():
    trace = events(*ONE_BY_ONE, experts=3)
    # 0 and 2 at the start; 1 passes by; 2 goes after its last use, for 1 it is too late
    assert hits(trace, belady(trace, (2,))) == [1, 1, 1, 0, 1, 1, 1, 0]


def most_hits(trace, slots) -> int:
    """Over all residents that a cache with bypass could have, by dynamic programming."""
    used = [frozenset(np.flatnonzero(row[0]).tolist()) for row in trace.counts]
    everything = range(1 << trace.experts)
    sets = [frozenset(e for e in range(trace.experts) if m >> e & 1) for m in everything]
    best = {s: 0 for s in sets if len(s) <= slots}
    for now in used:
        scored = {s: score + len(s & now) for s, score in best.items()}
        best = {
            s: max(score for old, score in scored.items() if s <= old | now)
            for s in sets
            if len(s) <= slots
        }
    return max(best.values())


@given(seed=st.integers(0, 10**6), slots=st.integers(0, 4), k=st.integers(1, 3))
@settings(max_examples=25)
def test_belady_is_the_most_that_can_be_hit(seed, slots, k):
    trace = uniform_trace(steps=7, layers=1, experts=4, experts_per_token=k, seed=seed)
    assert sum(hits(trace, belady(trace, (slots,)))) == most_hits(trace, slots)


@given(
    seed=st.integers(0, 10**6),
    slots=st.lists(st.integers(0, 8), min_size=2, max_size=2),
    locality=st.sampled_from([0.0, 0.7]),
    tokens=st.sampled_from([1, 3]),
    prompt=st.sampled_from([0, 9]),
)
def test_no_policy_hits_more_than_belady(seed, slots, locality, tokens, prompt):
    trace = zipf_trace(
        steps=20,
        layers=2,
        experts=8,
        experts_per_token=2,
        tokens=tokens,
        locality=locality,
        prompt=prompt,
        seed=seed,
    )
    slots = tuple(slots)
    best = belady(trace, slots)
    assert (best.sum(-1) <= slots).all()
    for policy in POLICIES:
        resident = cache_residents(trace, slots, policy)
        assert (resident.sum(-1) <= slots).all()
        assert hit_rate(trace, resident) <= hit_rate(trace, best)
        used = trace.counts > 0
        # Atomic: what a step hits stays, and only what was there or missed can be there next.
        assert (resident[1:] >= (used & resident)[:-1]).all()
        assert (resident[1:] <= (used | resident)[:-1]).all()
    assert (best[1:] <= (used | best)[:-1]).all()


@pytest.mark.parametrize("overlap", [False, True], ids=["engine", "overlap"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_is_consistent(policy, overlap):
    oracle = find_oracle(TRACE, CURVES, SLOTS)
    given = dict(policy=policy, expert_bytes=BYTES, most_per_step=2, overlap_uploads=overlap)
    result = simulate(TRACE, CURVES, SLOTS, oracle=oracle, **given)
    assert result.seconds.shape == result.bounds.shape == oracle.seconds.shape == (31,)
    assert (result.bounds <= result.seconds * (1 + 1e-6)).all()
    assert 0 < oracle.seconds.sum() <= result.total_seconds
    assert 0 < result.hit_rate <= oracle.hit_rate <= 1
    assert result.swaps <= 2 * 31
    uploads = result.uploaded_bytes // BYTES
    assert uploads <= result.swaps if overlap else uploads == result.swaps
    assert result.streamed_bytes % BYTES == 0
    if policy == "static":
        assert result.swaps == result.uploaded_bytes == result.exposed_seconds == 0
    else:
        assert result.swaps > 0


def test_static_on_the_host_moves_no_byte():
    result = simulate(TRACE, CURVES, SLOTS, policy="static", planner=host_all, expert_bytes=BYTES)
    assert result.streamed_bytes == result.uploaded_bytes == 0


@pytest.mark.parametrize("name", MACHINES)
def test_no_rule_is_faster_than_the_planner_on_the_same_residents(name):
    curves = curves_for(MACHINES[name], 2048, 768)
    seconds = {
        rule: simulate(TRACE, curves, SLOTS, policy="static", planner=rule).total_seconds
        for rule in (plan_layer, fiddler, stream_all, host_all)
    }
    assert min(seconds.values()) == seconds[plan_layer]


def test_moving_or_not_the_loop_is_the_same():
    """`most_per_step=0` takes the fast way of fixed residents, a refusing gate the slow one."""
    never = make_curves(host=4.0, stream=np.inf)
    fast = simulate(TRACE, never, SLOTS, policy="lru", most_per_step=0)
    slow = simulate(TRACE, never, SLOTS, policy="lru")
    np.testing.assert_allclose(slow.seconds, fast.seconds)
    assert (slow.swaps, slow.hit_rate) == (0, fast.hit_rate)


@pytest.mark.parametrize("overlap", [False, True], ids=["engine", "overlap"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rate", [1e8, 1e9, 31.5e9])
def test_caching_never_costs_more_than_it_brings(policy, rate, overlap):
    """On a slow link too, no policy is more than 3 % slower than static placement."""
    curves = curves_for(replace(MACHINES["rtx4090"], link_rate=rate), 2048, 768)
    fixed = simulate(TRACE, curves, SLOTS, policy="static").total_seconds
    moved = simulate(TRACE, curves, SLOTS, policy=policy, overlap_uploads=overlap)
    assert moved.total_seconds <= 1.03 * fixed


def test_figures_worked_by_hand():
    """Two experts a step, expert 0 resident; a miss costs 3 s streamed and 4 s on the host."""
    trace = events([0, 1], [1, 2], experts=3)
    result = simulate(trace, make_curves(), (1,), policy="static", expert_bytes=10)
    # step 1: stream 1 for 2 s, then 1 s. step 2: one of two streamed (3 s), the other 4 s
    assert result.seconds.tolist() == [3.0, 4.0]
    assert result.hit_rate == 0.25
    assert result.streamed_bytes == 20
    # bounds: host 4 - 4 f = device 1 + f, then host 8 - 4 f = link 2 f
    np.testing.assert_allclose(result.bounds, [1.6, 8 / 3])
    assert result.record()["decode_seconds"] == 3.5


def test_halves_worked_by_hand():
    """As above; half an expert costs half, but 0.75 s on the device."""
    trace = events([0, 1], [1, 2], experts=3)
    halves = Pieces(count=2, curves=make_curves(host=2.0, device=0.75, stream=1.0))
    given = dict(policy="static", pieces=halves, expert_bytes=10)
    result = simulate(trace, make_curves(), (1,), **given)
    # step 1: half of 1 streamed, 1 + 0.75 s of device, half on the host, 2 s
    # step 2: three halves streamed, 3 + 0.75 s, one on the host
    assert result.seconds.tolist() == [2.0, 3.75]
    assert result.streamed_bytes == 20
    np.testing.assert_allclose(result.bounds, [1.6, 8 / 3])  # those of whole experts


@pytest.mark.parametrize("policy", ["static", "lru"])
@pytest.mark.parametrize("name", MACHINES)
def test_halves_cost_launches_at_most_and_are_not_below_the_bound(name, policy):
    machine = MACHINES[name]
    pieces = {n: curves_for(machine, 2048, 768, pieces=n) for n in (1, 2)}
    given = dict(policy=policy, expert_bytes=BYTES)
    whole, one, two = (
        simulate(TRACE, pieces[1], SLOTS, pieces=cut, **given)
        for cut in (None, *(Pieces(count=n, curves=c) for n, c in pieces.items()))
    )
    np.testing.assert_array_equal(whole.seconds, one.seconds)
    assert (two.bounds <= two.seconds * (1 + 1e-6)).all()
    if policy == "static":
        np.testing.assert_array_equal(two.bounds, whole.bounds)
        launches = whole.streamed_bytes // BYTES
        assert two.total_seconds <= whole.total_seconds + launches * machine.device_launch


def test_the_bound_is_what_many_small_pieces_come_to():
    """It is not loose: where launches are free, only the size of pieces keeps plans from it."""
    ideal = replace(MACHINES["h200"], device_launch=0.0)
    ratios = []
    for n in (1, 2, 4, 64):
        pieces = Pieces(count=n, curves=curves_for(ideal, 2048, 768, pieces=n))
        curves = curves_for(ideal, 2048, 768)
        result = simulate(TRACE, curves, SLOTS, policy="static", pieces=pieces)
        ratios.append(result.total_seconds / result.bounds.sum())
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[0] > 1.1 and ratios[-1] < 1.005


def test_only_whole_experts_stay_for_free():
    trace = events([0], *(9 * [[2]]), experts=3)
    curves = make_curves(host=100.0, device=0.0, stream=100.0)
    halves = Pieces(count=2, curves=make_curves(host=50.0, device=0.0, stream=50.0))
    given = dict(policy="lru", expert_bytes=10, overlap_uploads=True)
    result = simulate(trace, curves, (2,), pieces=halves, **given)
    # Half of it comes over the link each time, and is no expert; later it pays to bring it.
    assert result.seconds[1] == 50.0
    assert (result.swaps, result.uploaded_bytes) == (1, 10)


def test_uploads_beyond_the_idle_link_cost_time():
    steps = [[0]] + 9 * [[2]]
    trace = events(*steps, experts=3)
    curves = make_curves(host=10.0, device=1.0, stream=100.0)
    given = dict(policy="lru", expert_bytes=10, overlap_uploads=True)
    result = simulate(trace, curves, (2,), **given)
    # 1 s, then misses of 10 s until an upload surely pays: 100 s, 10 of them beside the step
    assert (result.swaps, result.uploaded_bytes, result.exposed_seconds) == (1, 10, 90.0)
    assert result.seconds.tolist() == [1, 10, 10, 10 + 90] + 6 * [1]


def test_what_was_streamed_stays_for_free():
    trace = events([0], *(9 * [[2]]), experts=3)
    curves = make_curves(host=1000.0, device=1.0, stream=100.0)
    given = dict(policy="lru", expert_bytes=10, overlap_uploads=True)
    result = simulate(trace, curves, (2,), **given)
    assert (result.swaps, result.uploaded_bytes, result.exposed_seconds) == (1, 0, 0.0)
    assert (result.streamed_bytes, result.total_seconds) == (10, 1 + 101 + 8)


def test_the_engine_uploads_between_steps_and_sends_another_expert_back():
    trace = events([0], *(9 * [[2]]), experts=3)
    curves = make_curves(host=1000.0, device=1.0, stream=10.0)
    result = simulate(trace, curves, (2,), policy="lru", expert_bytes=10)
    assert (result.swaps, result.uploaded_bytes, result.exposed_seconds) == (1, 10, 20.0)
    streamed = result.streamed_bytes // 10
    assert result.total_seconds == 10 + 10 * streamed + 20


@pytest.mark.parametrize("slots, rate", [((0, 0, 0), 0.0), ((EXPERTS,) * 3, 1.0)])
def test_nothing_or_all_resident(slots, rate):
    oracle = find_oracle(TRACE, CURVES, slots)
    result = simulate(TRACE, CURVES, slots, policy="lru", oracle=oracle)
    assert result.hit_rate == oracle.hit_rate == rate
    assert result.swaps == 0
    np.testing.assert_allclose(result.bounds, oracle.seconds, rtol=1e-6)
    if rate == 1.0:
        np.testing.assert_allclose(result.seconds, oracle.seconds, rtol=1e-6)


def test_one_expert():
    trace = uniform_trace(steps=3, layers=1, experts=1, experts_per_token=1)
    result = simulate(trace, make_curves(stream=np.inf), (0,))
    assert result.total_seconds == 12.0
    assert simulate(trace, make_curves(stream=np.inf), (1,)).total_seconds == 3.0


def test_initial_residents_may_be_given():
    trace = events([2], [2], experts=3)
    result = simulate(trace, make_curves(), (1,), policy="static", initial=(np.array([2]),))
    assert result.hit_rate == 1.0


def test_slots_are_spread_evenly():
    assert uniform_slots(7, 3, 8) == (3, 2, 2)
    assert uniform_slots(100, 3, 8) == (8, 8, 8)
    assert uniform_slots(0, 2, 8) == (0, 0)
    assert uniform_slots(5, 0, 8) == ()


def test_a_row_of_a_table():
    prefill = np.array([True, False, False])
    result = Simulation(
        prefill=prefill,
        seconds=np.array([0.3, 0.02, 0.024]),
        bounds=np.array([0.2, 0.018, 0.022]),
        exposed=np.array([0.0, 0.0, 0.003]),
        oracle=Oracle(
            resident=np.zeros((3, 1, 2), bool),
            hit_rate=0.75,
            seconds=np.array([0.1, 0.01, 0.012]),
        ),
        hit_rate=0.5,
        streamed_bytes=3 * 10**9,
        uploaded_bytes=0,
        swaps=0,
    )
    assert str(result) == (
        "| 22.00 | 20.00 | 1.025 | 2.000 | 300 | 1.500 | 50.0% | 75.0% | 1000 | 0 | 1.00 |"
    )
    assert str(result).count("|") == len(Simulation.COLUMNS) + 1
    alone = replace(result, prefill=np.zeros(3, bool), oracle=None, bounds=np.zeros(3))
    assert str(alone) == "| 114.67 | 0.00 | inf | - | - | - | 50.0% | - | 1000 | 0 | 1.00 |"


@pytest.mark.parametrize("slots", [(6, 5), (6, 5, 17), (6, 5, -1)])
def test_slots_must_fit_the_trace(slots):
    for call in (
        lambda: simulate(TRACE, CURVES, slots),
        lambda: find_oracle(TRACE, CURVES, slots),
        lambda: cache_residents(TRACE, slots, "lru"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == (
            f"slots {slots} do not fit a trace of 3 layers with 16 experts; give one number from "
            "0 to the experts for each layer"
        )


def test_unknown_policies_are_refused():
    with pytest.raises(ValueError, match="no policy is called 'fifo'"):
        simulate(TRACE, CURVES, SLOTS, policy="fifo")
