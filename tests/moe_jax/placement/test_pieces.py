import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.machines import MACHINES, curves_for
from moe_jax.placement.pieces import Pieces, piece_seconds, plan_pieces
from moe_jax.placement.planner import Mode, plan_layer
from moe_jax.placement.rules import fiddler, host_all, lp_bound, stream_all

MOST_TOKENS = 12
EXPERTS = 4
PLANNERS = {"plan": plan_layer, "fiddler": fiddler, "stream": stream_all, "host": host_all}
solvers = {name: jax.jit(partial(plan_pieces, planner)) for name, planner in PLANNERS.items()}
cut = solvers["plan"]
whole = jax.jit(plan_layer)
bound_of = jax.jit(lp_bound)
played = jax.jit(lambda *plan: piece_seconds(*plan).layer(plan[3]))


def make_curves(host, device, stream, launch=0.0, latency=0.0, memory=0.0, beside=(1.0, 1.0)):
    """Curves with a knot at every count: whole numbers, so that float32 is exact."""
    return CostCurves(
        tokens=jnp.arange(1, MOST_TOKENS + 1, dtype=jnp.float32),
        host=jnp.asarray(np.broadcast_to(host, MOST_TOKENS), jnp.float32),
        device=jnp.asarray(np.broadcast_to(device, MOST_TOKENS), jnp.float32),
        stream=jnp.float32(stream),
        host_launch=jnp.float32(launch),
        link_latency=jnp.float32(latency),
        memory=jnp.float32(memory),
        host_beside=jnp.float32(beside[0]),
        link_beside=jnp.float32(beside[1]),
    )


@st.composite
def instances(draw, flat_device=True):
    """Experts of two or three pieces, which cost as much as the expert, and fixed costs each."""
    count = draw(st.sampled_from([2, 3]))
    counts = draw(st.lists(st.integers(0, MOST_TOKENS), min_size=EXPERTS, max_size=EXPERTS))
    resident = draw(st.lists(st.sampled_from([0, 0, 1]), min_size=EXPERTS, max_size=EXPERTS))
    rising = st.lists(st.integers(0, 3), min_size=MOST_TOKENS, max_size=MOST_TOKENS)
    host = np.cumsum(draw(rising))
    device = draw(st.integers(0, 5)) if flat_device else np.cumsum(draw(rising))
    stream, memory, launch, latency = (draw(st.integers(0, 5)) for _ in range(4))
    once_host, once_device = (draw(st.integers(0, 3)) for _ in range(2))
    rest = launch, latency
    beside = draw(st.sampled_from([(1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]))
    expert = make_curves(
        once_host + count * host,
        once_device + count * device,
        count * stream,
        *rest,
        memory=count * memory,
        beside=beside,
    )
    piece = make_curves(
        once_host + host, once_device + device, stream, *rest, memory=memory, beside=beside
    )
    arrays = jnp.asarray(counts, jnp.int32), jnp.asarray(resident, bool)
    return *arrays, expert, Pieces(curves=piece, count=count)


def makespan(counts, resident, expert, pieces, streamed) -> float:
    """Seconds if that many pieces of each missing expert are streamed, by playing it through."""
    piece, count = pieces.curves, pieces.count
    read = lambda curve, n: float(curve[n - 1])
    missing = [e for e, n in enumerate(counts) if n and not resident[e]]
    residents = [e for e, n in enumerate(counts) if n and resident[e]]
    hosted = sum(count - streamed[e] for e in missing)
    host_end = sum((count - streamed[e]) * read(piece.host, counts[e]) for e in missing)
    host_end += float(piece.host_launch) if hosted else 0.0
    work = sum(read(expert.device, counts[e]) for e in residents)
    end, arrival = 0.0, float(piece.link_latency)
    for e in sorted(missing, key=lambda e: -counts[e]):
        for _ in range(streamed[e]):
            arrival += float(piece.stream)
            end = max(end, arrival) + read(piece.device, counts[e])
            work += read(piece.device, counts[e])
    any_streamed = sum(streamed[e] for e in missing) > 0
    device = max(end, work) if piece.link_beside else work + arrival * any_streamed
    total = max(host_end, device) if piece.host_beside else host_end + device
    return max(total, len(missing) * count * float(piece.memory))


def brute_force(counts, resident, expert, pieces) -> float:
    """The least makespan over all numbers of pieces of each expert: which of them makes no odds."""
    amounts = [
        range(pieces.count + 1) if n and not kept else (0,)
        for n, kept in zip(counts, resident, strict=True)
    ]
    return min(makespan(counts, resident, expert, pieces, s) for s in itertools.product(*amounts))


def solve(counts, resident, expert, pieces, solver=cut):
    """Pieces streamed of each expert, and seconds, after checking that the plan is what it says."""
    plan = solver(counts, resident, expert, pieces)
    modes = np.asarray(plan.mode).reshape(EXPERTS, pieces.count)
    instance = counts, resident
    counts, resident = counts.tolist(), resident.tolist()
    streamed = (modes == Mode.STREAM).sum(1).tolist()
    hosted = (modes == Mode.HOST).sum(1)
    for e, n in enumerate(counts):
        missing = n > 0 and not resident[e]
        assert (modes[e] == Mode.IDLE).all() == (n == 0)
        assert (modes[e] == Mode.RESIDENT).all() == (n > 0 and resident[e])
        assert streamed[e] + hosted[e] == (pieces.count if missing else 0)
    assert int(plan.streams) == sum(streamed)
    seconds = float(plan.predicted)
    assert seconds == makespan(counts, resident, expert, pieces, streamed)
    assert float(played(plan.mode, *instance, expert, pieces)) == seconds
    return streamed, seconds, float(plan.lower_bound)


@given(instance=instances())
def test_no_way_to_cut_is_better(instance):
    counts, resident, expert, pieces = instance
    streamed, seconds, bound = solve(*instance)
    best = brute_force(counts.tolist(), resident.tolist(), expert, pieces)
    assert seconds == best
    assert bound <= best
    assert sum(0 < s < pieces.count for s in streamed) <= 1


@given(instance=instances(flat_device=False))
def test_the_bound_holds_for_any_device_curve(instance):
    counts, resident, expert, pieces = instance
    streamed, seconds, bound = solve(*instance)
    assert bound <= brute_force(counts.tolist(), resident.tolist(), expert, pieces) <= seconds
    assert sum(0 < s < pieces.count for s in streamed) <= 1


@given(instance=instances(flat_device=False))
def test_cutting_costs_no_more_than_its_fixed_costs(instance):
    """Of the other plans, the one that cuts nothing pays a fixed cost for each piece but one."""
    counts, resident, expert, pieces = instance
    _, seconds, _ = solve(*instance)
    plan = whole(counts, resident, expert)
    n = jnp.maximum(counts, 1)
    host = pieces.count * pieces.curves.host_seconds(n) - expert.host_seconds(n)
    device = pieces.count * pieces.curves.device_seconds(n) - expert.device_seconds(n)
    extra = jnp.where(plan.mode == Mode.STREAM, device, 0).sum()
    extra += jnp.where(plan.mode == Mode.HOST, host, 0).sum()
    assert seconds <= float(plan.predicted) + float(extra)
    assert float(bound_of(counts, resident, expert)) <= seconds * (1 + 1e-6)


@pytest.mark.parametrize("name", PLANNERS)
@given(instance=instances(flat_device=False))
@settings(max_examples=20)
def test_any_planner_may_plan_pieces(name, instance):
    *_, seconds, _ = solve(*instance, solver=solvers[name])
    assert float(cut(*instance).predicted) <= seconds


@pytest.mark.parametrize("name", PLANNERS)
@given(instance=instances(flat_device=False))
@settings(max_examples=10)
def test_one_piece_is_the_whole_expert(name, instance):
    counts, resident, expert, _ = instance
    uncut = solvers[name](counts, resident, expert, Pieces(curves=expert, count=1))
    jax.tree.map(
        np.testing.assert_array_equal, uncut, jax.jit(PLANNERS[name])(counts, resident, expert)
    )


def test_an_expert_is_cut_where_both_ends_meet():
    """One expert takes 12 s either way, half of it here and half there 6 s, two thirds 8 s."""
    one = jnp.array([3], jnp.int32), jnp.array([False])
    expert = make_curves(12, 0, 12)
    for count, expected in ((1, 12), (2, 6), (3, 8)):
        pieces = Pieces(curves=make_curves(12 // count, 0, 12 // count), count=count)
        assert float(cut(*one, expert, pieces).predicted) == expected


def test_an_expert_is_not_cut_for_nothing():
    """Memory is the limit: 8 s. One piece on the link is enough, but a whole expert can stay."""
    counts, resident = jnp.array([2, 2], jnp.int32), jnp.zeros(2, bool)
    expert = make_curves(4, 0, 4, launch=1, memory=4)
    pieces = Pieces(curves=make_curves(2, 0, 2, launch=1, memory=2), count=2)
    plan = cut(counts, resident, expert, pieces)
    assert plan.mode.tolist() == 2 * [Mode.STREAM] + 2 * [Mode.HOST]
    assert (float(plan.predicted), int(plan.streams)) == (8.0, 2)
    # A slower link: the whole expert would take longer.
    slow = Pieces(curves=make_curves(2, 0, 7, launch=1, memory=2), count=2)
    plan = cut(counts, resident, make_curves(4, 0, 14, launch=1, memory=4), slow)
    assert plan.mode.tolist() == [Mode.STREAM] + 3 * [Mode.HOST]
    assert (float(plan.predicted), int(plan.streams)) == (8.0, 1)


@pytest.mark.parametrize(
    "counts, resident, seconds",
    [([0, 0, 0], [0, 1, 0], 0.0), ([1, 2, 3], [1, 1, 1], 21.0), ([0, 9, 0], [1, 1, 1], 7.0)],
)
def test_nothing_to_decide(counts, resident, seconds):
    """Residents take their own time, not that of their pieces."""
    expert, piece = make_curves(4, 7, 4), make_curves(2, 5, 2)
    arrays = jnp.asarray(counts, jnp.int32), jnp.asarray(resident, bool)
    plan = cut(*arrays, expert, Pieces(curves=piece, count=2))
    assert float(plan.predicted) == float(plan.lower_bound) == seconds
    assert int(plan.streams) == 0
    expected = [Mode.RESIDENT if n else Mode.IDLE for n in counts for _ in range(2)]
    assert plan.mode.tolist() == expected


@pytest.mark.parametrize("never", ["host", "stream"])
def test_a_way_that_is_closed_is_not_taken(never):
    counts, resident = jnp.array([5, 1], jnp.int32), jnp.zeros(2, bool)
    ways = dict(host=3.0, device=1.0, stream=2.0) | {never: np.inf}
    plan = cut(counts, resident, make_curves(**ways), Pieces(curves=make_curves(**ways), count=2))
    assert set(plan.mode.tolist()) == {Mode.STREAM if never == "host" else Mode.HOST}
    assert np.isfinite(float(plan.predicted))


@pytest.mark.parametrize("counts", [[4000], [2**20]])
def test_counts_past_the_last_knot(counts):
    """The last slope goes on for pieces, beside the made-up item of the residents."""
    machine = MACHINES["rtx4090"]
    expert, piece = (curves_for(machine, 4096, 14336, 2, pieces) for pieces in (1, 2))
    arrays = jnp.asarray(counts, jnp.int32), jnp.array([False])
    plan = cut(*arrays, expert, Pieces(curves=piece, count=2))
    assert plan.mode.tolist() == [Mode.STREAM] * 2
    expected = piece.link_latency + piece.stream + 2 * piece.device_seconds(arrays[0][0])
    np.testing.assert_allclose(plan.predicted, expected, rtol=1e-5)


def test_few_missing_experts_gain_the_most():
    """Ratios to the bound where host and link are all that counts, up to three missing experts."""
    random = np.random.default_rng(0)
    draws = 3000
    counts = np.where(np.arange(3) < random.integers(1, 4, (draws, 1)), 1, 0).astype(np.int32)
    host, stream = np.exp(random.uniform(np.log(1 / 4), np.log(4), (2, draws))).astype(np.float32)
    resident = jnp.zeros((draws, 3), bool)

    def ratio(counts, resident, host, stream, pieces):
        of = lambda part: make_flat(host / part, stream / part)
        plan = plan_pieces(
            plan_layer, counts, resident, of(1), Pieces(curves=of(pieces), count=pieces)
        )
        return plan.predicted / lp_bound(counts, resident, of(1))

    for pieces, worst, mean in ((1, 2.0, 1.30), (2, 1.5, 1.16), (4, 1.25, 1.08)):
        found = jax.jit(jax.vmap(partial(ratio, pieces=pieces)))(counts, resident, host, stream)
        assert float(found.min()) >= 1 - 1e-5
        assert float(found.max()) <= worst + 1e-5
        assert float(found.mean()) <= mean


def make_flat(host, stream):
    zero = jnp.zeros((), jnp.float32)
    return CostCurves(
        tokens=jnp.ones(1),
        host=jnp.reshape(host, 1),
        device=jnp.zeros(1),
        stream=jnp.reshape(stream, ()),
        host_launch=zero,
        link_latency=zero,
        memory=zero,
    )


def test_layers_are_planned_together_under_vmap():
    random = np.random.default_rng(0)
    counts = jnp.asarray(random.integers(0, 12, (4, 5)), jnp.int32)
    resident = jnp.asarray(random.random((4, 5)) < 0.3)
    expert, piece = (curves_for(MACHINES["h200"], 2048, 768, 2, pieces) for pieces in (1, 2))
    rest = expert, Pieces(curves=piece, count=2)
    together = jax.jit(jax.vmap(partial(plan_pieces, plan_layer), (0, 0, None, None)))
    plans = together(counts, resident, *rest)
    for layer in range(4):
        alone = cut(counts[layer], resident[layer], *rest)
        np.testing.assert_array_equal(plans.mode[layer], alone.mode)
        np.testing.assert_allclose(plans.predicted[layer], alone.predicted, rtol=1e-6)


def test_less_than_one_piece_is_refused():
    with pytest.raises(ValueError) as error:
        Pieces(curves=make_curves(1, 1, 1), count=0)
    assert str(error.value) == "experts in 0 pieces; 1 leaves them whole, 2 halves them"
