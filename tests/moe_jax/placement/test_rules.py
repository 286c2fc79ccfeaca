import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, plan_layer
from moe_jax.placement.rules import fiddler, host_all, lp_bound, resource_seconds, stream_all

MOST_TOKENS = 12
EXPERTS = 6
RULES = {"fiddler": fiddler, "stream_all": stream_all, "host_all": host_all}
jitted = {name: jax.jit(rule) for name, rule in RULES.items()}
plan = jax.jit(plan_layer)
bound_of = jax.jit(lp_bound)
play = jax.jit(lambda *arguments: resource_seconds(*arguments).layer(arguments[-1]))


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


def arrays(counts, resident):
    return jnp.asarray(counts, jnp.int32), jnp.asarray(resident, bool)


costs = st.integers(0, 9)


@st.composite
def instances(draw, flat_device=True, host_and_link_only=False):
    size = dict(min_size=EXPERTS, max_size=EXPERTS)
    counts = draw(st.lists(st.integers(0, MOST_TOKENS), **size))
    resident = draw(st.lists(st.sampled_from([0, 0, 1]), **size))
    steps = st.lists(st.integers(0, 3), min_size=MOST_TOKENS, max_size=MOST_TOKENS)
    host = np.cumsum(draw(steps))
    if host_and_link_only:
        curves = make_curves(host, MOST_TOKENS * [0], draw(costs))
    else:
        device = MOST_TOKENS * [draw(costs)] if flat_device else np.cumsum(draw(steps))
        beside = draw(st.sampled_from([(1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0)]))
        curves = make_curves(
            host, device, draw(costs), draw(costs), draw(costs), draw(costs), *beside
        )
    return *arrays(counts, resident), curves


@given(instance=instances(flat_device=False), max_streams=st.sampled_from([None, 0, 2]))
def test_no_rule_beats_the_planner(instance, max_streams):
    best = plan(*instance, max_streams)
    for rule in jitted.values():
        assert float(best.predicted) <= float(rule(*instance, max_streams).predicted)


@given(instance=instances(flat_device=False))
def test_the_plan_takes_what_the_planner_predicts(instance):
    counts, _, curves = instance
    best = plan(*instance)
    assert float(play(best.mode, counts, curves)) == float(best.predicted)


@given(instance=instances(flat_device=False))
def test_no_assignment_beats_the_bound(instance):
    counts, resident, curves = instance
    least = float(bound_of(*instance)) * (1 - 1e-6)
    active = np.asarray(counts) > 0
    for choice in range(2**EXPERTS):
        bits = (choice >> np.arange(EXPERTS)) & 1
        mode = np.where(bits, Mode.STREAM.value, Mode.HOST.value)
        mode = np.where(resident, Mode.RESIDENT.value, mode)
        mode = np.where(active, mode, Mode.IDLE.value).astype(np.int32)
        assert least <= float(play(mode, counts, curves))
    for rule in (plan, *jitted.values()):
        result = rule(*instance)
        assert float(result.lower_bound) <= float(result.predicted)


@given(instance=instances(host_and_link_only=True))
def test_the_gap_to_the_bound_is_what_a_split_can_win(instance):
    """T_LP <= T <= T_LP + x l / (x + l) where only host and link bind."""
    counts, resident, curves = instance
    best, least = float(plan(*instance).predicted), float(bound_of(*instance))
    missing = np.asarray(counts)[(np.asarray(counts) > 0) & ~np.asarray(resident)]
    x = float(np.asarray(curves.host)[missing.max() - 1]) if missing.size else 0.0
    link = float(curves.stream)
    gap = x * link / (x + link) if x + link else 0.0
    assert least * (1 - 1e-6) <= best <= (least + gap) * (1 + 1e-6)


def fractional(counts, resident, curves, parts=8):
    """The best streamed amount on a grid, in the smooth model: an upper bound of `lp_bound`."""
    read = lambda curve, n: float(curve[n - 1])
    missing = sorted((n for n, r in zip(counts, resident, strict=True) if n and not r))[::-1]
    host = [read(curves.host, n) for n in missing]
    busy = sum(read(curves.device, n) for n, r in zip(counts, resident, strict=True) if n and r)
    best = np.inf
    for v in np.linspace(0, len(missing), parts * len(missing) + 1):
        share = np.clip(v - np.arange(len(missing)), 0, 1)
        on_host = sum((1 - s) * x for s, x in zip(share, host, strict=True))
        on_host += float(curves.host_launch) * (v < len(missing))
        link = v * float(curves.stream) + float(curves.link_latency) * (v > 0)
        work = busy + v * float(curves.device[0])
        device = max(work, link) if curves.link_beside else work + link
        total = max(on_host, device) if curves.host_beside else on_host + device
        best = min(best, max(total, len(missing) * float(curves.memory)))
    return best


@given(instance=instances())
def test_the_bound_is_reached_by_splitting(instance):
    counts, resident, curves = instance
    least = float(bound_of(*instance))
    grid = fractional(counts.tolist(), resident.tolist(), curves)
    coarse = 36 / 8  # the steepest line has a slope of 3 * 12
    assert least <= grid * (1 + 1e-6) + 1e-6
    assert grid <= least + coarse


@pytest.mark.parametrize(
    "costs, expected",
    [
        ({}, 4.0),  # host 9 - 5 f, link 2 + 2 f: they meet at f = 1
        (dict(stream=3.0), 5.25),  # at 3 + 3 f
        (dict(stream=np.inf), 15.0),
        (dict(host=MOST_TOKENS * (np.inf,)), 6.0),
        (dict(stream=np.inf, host=MOST_TOKENS * (np.inf,)), np.inf),
        (dict(stream=0.0, device=MOST_TOKENS * (0,)), 0.0),
        (dict(host=MOST_TOKENS * (0,)), 0.0),
        (dict(memory=50.0), 150.0),
        (dict(host_launch=100.0), 6.0),
        (dict(link_latency=100.0), 15.0),
        (dict(host_beside=0.0), 6.0),
        (dict(host_beside=0.0, link_beside=0.0), 9.0),
    ],
)
def test_bounds_worked_by_hand(costs, expected):
    counts, resident = arrays([6, 5, 4], [0, 0, 0])
    np.testing.assert_allclose(bound_of(counts, resident, make_curves(**costs)), expected)


def test_one_expert_is_cut_where_both_finish_together():
    curves = make_curves(device=MOST_TOKENS * (0,), stream=6.0)
    result = bound_of(*arrays([6], [0]), curves)
    np.testing.assert_allclose(result, 3.0)  # half here, half there
    assert float(plan(*arrays([6], [0]), curves).predicted) == 6.0
    alone = make_curves(device=MOST_TOKENS * (0,), stream=6.0, host_beside=0.0)
    np.testing.assert_allclose(bound_of(*arrays([6], [0]), alone), 6.0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "counts, resident, seconds",
    [([0, 0, 0], [0, 1, 0], 0.0), ([1, 2, 3], [1, 1, 1], 3.0)],
)
def test_nothing_to_decide(name, counts, resident, seconds):
    result = jitted[name](*arrays(counts, resident), make_curves())
    assert float(result.predicted) == float(result.lower_bound) == seconds
    assert int(result.streams) == 0


def names(result):
    return [Mode(int(mode)).name for mode in result.mode]


def test_fiddlers_rule_worked_by_hand():
    """Flat host costs are taken to grow with the tokens: 4 per token against 10 + 1."""
    curves = make_curves(host=MOST_TOKENS * (4,), stream=10.0)
    result = jitted["fiddler"](*arrays([2, 3, 0, 9], [0, 0, 0, 1]), curves)
    assert names(result) == ["HOST", "STREAM", "IDLE", "RESIDENT"]
    assert float(result.predicted) == 11.0
    assert float(plan(*arrays([2, 3, 0, 9], [0, 0, 0, 1]), curves).predicted) == 8.0


@pytest.mark.parametrize(
    "name, expected",
    [("fiddler", "HHS"), ("stream_all", "HHS"), ("host_all", "HHH")],
)
def test_streams_may_be_limited(name, expected):
    curves = make_curves(host=np.arange(1, 13) * 10)
    result = jitted[name](*arrays([5, 4, 6], [0, 0, 0]), curves, 1)
    assert [mode[0] for mode in names(result)] == list(expected)
    assert int(result.streams) == expected.count("S")


def test_layers_are_planned_together_under_vmap():
    random = np.random.default_rng(0)
    counts, resident = arrays(random.integers(0, 12, (4, 5)), random.random((4, 5)) < 0.3)
    for rule in (fiddler, lp_bound):
        jitted_rule = jax.jit(rule)
        layers = jax.jit(jax.vmap(rule, in_axes=(0, 0, None)))
        together = layers(counts, resident, make_curves())
        for layer in range(4):
            alone = jitted_rule(counts[layer], resident[layer], make_curves())
            for whole, part in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                np.testing.assert_allclose(whole[layer], part, rtol=1e-6)
