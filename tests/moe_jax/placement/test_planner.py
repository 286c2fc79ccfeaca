import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, plan_layer

MOST_TOKENS = 12
plan = jax.jit(plan_layer)


def make_curves(
    host=range(1, MOST_TOKENS + 1),
    device=MOST_TOKENS * (1,),
    stream=2.0,
    host_launch=0.0,
    link_latency=0.0,
    memory=0.0,
    host_beside=1.0,
    link_beside=1.0,
):
    """Curves with a knot at every count: whole numbers, so that float32 is exact."""
    return CostCurves(
        tokens=jnp.arange(1, MOST_TOKENS + 1, dtype=jnp.float32),
        host=jnp.asarray(list(host), jnp.float32),
        device=jnp.asarray(list(device), jnp.float32),
        stream=jnp.float32(stream),
        host_launch=jnp.float32(host_launch),
        link_latency=jnp.float32(link_latency),
        memory=jnp.float32(memory),
        host_beside=jnp.float32(host_beside),
        link_beside=jnp.float32(link_beside),
    )


def makespan(counts, resident, curves, streamed) -> float:
    """Seconds of one split of the missing experts, by playing it through."""
    read = lambda curve, n: float(curve[n - 1])
    active = [e for e, n in enumerate(counts) if n]
    missing = [e for e in active if not resident[e]]
    host = [e for e in missing if e not in streamed]
    host_end = sum(read(curves.host, counts[e]) for e in host)
    host_end += float(curves.host_launch) if host else 0.0
    resident_end = sum(read(curves.device, counts[e]) for e in active if resident[e])
    device_end, arrival, work = 0.0, float(curves.link_latency), resident_end
    for e in sorted(streamed, key=lambda e: -counts[e]):
        arrival += float(curves.stream)
        device_end = max(device_end, arrival) + read(curves.device, counts[e])
        work += read(curves.device, counts[e])
    device = max(device_end, work) if curves.link_beside else work + arrival * bool(streamed)
    end = max(host_end, device) if curves.host_beside else host_end + device
    return max(end, len(missing) * float(curves.memory))


def brute_force(counts, resident, curves, max_streams=None) -> float:
    """The least makespan over all subsets of the missing experts."""
    missing = [e for e, n in enumerate(counts) if n and not resident[e]]
    most = len(missing) if max_streams is None else min(max_streams, len(missing))
    subsets = (itertools.combinations(missing, m) for m in range(most + 1))
    return min(makespan(counts, resident, curves, s) for s in itertools.chain(*subsets))


def solve(counts, resident, curves, max_streams=None):
    """The plan, as a plain record, after checking that it says what it does."""
    result = plan(jnp.asarray(counts, jnp.int32), jnp.asarray(resident, bool), curves, max_streams)
    mode = [Mode(int(m)) for m in result.mode]
    for count, kept, chosen in zip(counts, resident, mode, strict=True):
        assert (chosen is Mode.IDLE) == (count == 0)
        assert (chosen is Mode.RESIDENT) == (count > 0 and kept)
    streamed = [e for e, m in enumerate(mode) if m is Mode.STREAM]
    assert int(result.streams) == len(streamed)
    assert max_streams is None or len(streamed) <= max_streams
    if np.isfinite(result.predicted):
        assert float(result.predicted) == makespan(counts, resident, curves, streamed)
    assert float(result.lower_bound) <= float(result.predicted)
    return mode, float(result.predicted), float(result.lower_bound)


costs = st.integers(0, 9)


@st.composite
def instances(draw, flat_device=True, experts=8):
    """Eight experts; costs are small whole numbers, so that ties are frequent."""
    counts = draw(st.lists(st.integers(0, MOST_TOKENS), min_size=experts, max_size=experts))
    resident = draw(st.lists(st.sampled_from([0, 0, 1]), min_size=experts, max_size=experts))
    steps = st.lists(st.integers(0, 3), min_size=MOST_TOKENS, max_size=MOST_TOKENS)
    host = np.cumsum(draw(steps))
    device = MOST_TOKENS * [draw(costs)] if flat_device else np.cumsum(draw(steps))
    beside = st.sampled_from([1.0, 1.0, 0.0])
    singles = [draw(costs) for _ in range(4)]
    curves = make_curves(host, device, *singles, draw(beside), draw(beside))
    return counts, [bool(r) for r in resident], curves


@given(instance=instances(), max_streams=st.sampled_from([None, 0, 1, 3]))
def test_equal_to_brute_force(instance, max_streams):
    _, seconds, bound = solve(*instance, max_streams)
    best = brute_force(*instance, max_streams)
    assert seconds == best
    assert bound <= best


@given(instance=instances(flat_device=False))
def test_the_bound_holds_for_any_device_curve(instance):
    _, seconds, bound = solve(*instance)
    assert bound <= brute_force(*instance) <= seconds


@given(instance=instances())
def test_among_the_best_prefixes_the_shortest_and_lower_ids_first(instance):
    counts, resident, curves = instance
    mode, *_ = solve(*instance)
    missing = [e for e, n in enumerate(counts) if n and not resident[e]]
    order = sorted(missing, key=lambda e: (-counts[e], e))
    scores = [makespan(counts, resident, curves, order[:m]) for m in range(len(order) + 1)]
    expected = order[: int(np.argmin(scores))]
    assert [e for e, m in enumerate(mode) if m is Mode.STREAM] == sorted(expected)


@given(instance=instances(), order=st.permutations(range(8)))
def test_the_names_of_experts_do_not_matter(instance, order):
    counts, resident, curves = instance
    mode, seconds, bound = solve(*instance)
    permuted = solve([counts[e] for e in order], [resident[e] for e in order], curves)
    assert permuted[1:] == (seconds, bound)
    by_count = lambda mode, counts: sorted(zip(counts, mode, strict=True))
    assert by_count(permuted[0], [counts[e] for e in order]) == by_count(mode, counts)


@given(instance=instances())
def test_the_unit_of_time_does_not_matter(instance):
    counts, resident, curves = instance
    mode, seconds, bound = solve(*instance)
    times = {
        name: 8 * getattr(curves, name)
        for name in ("host", "device", "stream", "host_launch", "link_latency", "memory")
    }
    assert solve(counts, resident, replace(curves, **times)) == (mode, 8 * seconds, 8 * bound)


@given(instance=instances(), expert=st.integers(0, 7))
def test_more_work_or_slower_parts_never_help(instance, expert):
    counts, resident, curves = instance
    _, seconds, _ = solve(*instance)
    more = list(counts)
    more[expert] = min(more[expert] + 1, MOST_TOKENS)
    assert solve(more, resident, curves)[1] >= seconds
    slower = [replace(curves, host=curves.host + 1)]
    slower += [
        replace(curves, **{name: getattr(curves, name) + 1})
        for name in ("device", "stream", "host_launch", "link_latency", "memory")
    ]
    for other in slower:
        assert solve(counts, resident, other)[1] >= seconds


DEGENERATE = {
    "no expert has tokens": (dict(counts=[0, 0, 0]), {}, ["IDLE"] * 3, 0),
    "all resident": (dict(resident=[1, 1, 1]), {}, ["RESIDENT"] * 3, 3),
    "one expert, on the host": (dict(counts=[2], resident=[0]), {}, ["HOST"], 2),
    "one expert, streamed": (dict(counts=[9], resident=[0]), {}, ["STREAM"], 3),
    "one missing expert": (dict(resident=[1, 0, 1]), {}, ["RESIDENT", "STREAM", "RESIDENT"], 3),
    "equal counts": (dict(counts=[5, 5, 5]), {}, ["STREAM", "STREAM", "HOST"], 5),
    "one hot expert": (dict(counts=[1, 12, 1]), {}, ["HOST", "STREAM", "HOST"], 3),
    "no slot": (dict(max_streams=0), {}, ["HOST"] * 3, 15),
    "one slot": (dict(max_streams=1), {}, ["STREAM", "HOST", "HOST"], 9),
    "streaming is free": ({}, dict(stream=0.0, device=MOST_TOKENS * (0,)), ["STREAM"] * 3, 0),
    "never stream": ({}, dict(stream=np.inf), ["HOST"] * 3, 15),
    "never host": ({}, dict(host=MOST_TOKENS * (np.inf,)), ["STREAM"] * 3, 7),
    "never host beyond 4 tokens": (
        {},
        dict(host=[1.0] * 4 + [np.inf] * 8, stream=100.0),
        ["STREAM", "STREAM", "HOST"],
        201,
    ),
    "no way": ({}, dict(stream=np.inf, host=MOST_TOKENS * (np.inf,)), ["HOST"] * 3, np.inf),
    "the host is free": ({}, dict(host=MOST_TOKENS * (0,)), ["HOST"] * 3, 0),
    "a launch that costs too much": ({}, dict(host_launch=100.0), ["STREAM"] * 3, 7),
    "a plateau set by memory": ({}, dict(memory=50.0), ["HOST"] * 3, 150),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_cases(name):
    call, costs, expected, seconds = DEGENERATE[name]
    arguments = dict(counts=[6, 5, 4], resident=[0, 0, 0], max_streams=None) | call
    resident = [bool(r) for r in arguments["resident"]]
    mode, predicted, _ = solve(
        arguments["counts"], resident, make_curves(**costs), arguments["max_streams"]
    )
    assert [m.name for m in mode] == expected
    assert predicted == seconds


def test_many_tokens_and_experts_stay_finite():
    counts = jnp.full(512, 100_000, jnp.int32)
    result = plan(counts, jnp.zeros(512, bool), make_curves(host=np.arange(1, 13) * 1e-3))
    assert np.isfinite(result.predicted)
    assert 0 < int(result.streams) <= 512


def test_layers_are_planned_together_under_vmap():
    random = np.random.default_rng(0)
    counts = jnp.asarray(random.integers(0, MOST_TOKENS, (5, 8)), jnp.int32)
    resident = jnp.asarray(random.random((5, 8)) < 0.3)
    together = jax.vmap(plan_layer, in_axes=(0, 0, None))(counts, resident, make_curves())
    for layer in range(5):
        alone = plan(counts[layer], resident[layer], make_curves())
        for whole, part in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(whole[layer], part)


def test_values_do_not_recompile():
    traces = []

    @jax.jit
    def step(counts, resident, curves, max_streams):
        traces.append(1)
        return plan_layer(counts, resident, curves, max_streams)

    for n in (0, 3, 9):
        step(jnp.full(4, n), jnp.arange(4) < n, make_curves(stream=n), jnp.int32(n))
    assert len(traces) == 1
