import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.pieces import Pieces, plan_pieces
from moe_jax.placement.planner import Mode, plan_layer, plan_layers
from moe_jax.placement.rules import fiddler, host_all, stream_all
from moe_jax.placement.timeline import LANES, make_timeline

EXPERTS, LAYERS = 6, 40


def make_curves(beside=(1, 1), **changes):
    knots = jnp.arange(1.0, 17.0)
    costs = dict(
        tokens=knots,
        host=3 * knots,
        device=jnp.full(16, 2.0),
        stream=jnp.float32(5),
        host_launch=jnp.float32(1),
        link_latency=jnp.float32(2),
        memory=jnp.float32(1.5),
        host_beside=jnp.float32(beside[0]),
        link_beside=jnp.float32(beside[1]),
    )
    return CostCurves(**(costs | changes))


def draw(seed=0):
    random = np.random.default_rng(seed)
    counts = random.integers(0, 17, (LAYERS, EXPERTS)) * (random.random((LAYERS, EXPERTS)) < 0.7)
    return counts.astype(np.int32), random.random((LAYERS, EXPERTS)) < 0.4


@pytest.mark.parametrize("beside", [(1, 1), (0, 1), (0, 0)], ids=["gpu", "tpu", "cpu"])
@pytest.mark.parametrize("planner", [plan_layer, fiddler, stream_all, host_all])
def test_a_layer_ends_when_its_planner_says(planner, beside):
    counts, resident = draw()
    curves = make_curves(beside)
    plans = plan_layers(planner, counts, resident, curves)
    modes = np.asarray(plans.mode)
    ends = [
        make_timeline(counts[i : i + 1], modes[i : i + 1], curves).seconds for i in range(LAYERS)
    ]
    np.testing.assert_allclose(ends, plans.predicted, rtol=1e-6)
    whole = make_timeline(counts, modes, curves, dense_seconds=4.0)
    assert whole.seconds == pytest.approx(float(plans.predicted.sum()) + 4 * LAYERS)
    taken = np.asarray(plans.predicted) + 4
    np.testing.assert_allclose(list(whole.layer_starts.values()), np.cumsum(taken) - taken, 1e-5)


@pytest.mark.parametrize("beside", [(1, 1), (0, 1), (0, 0)], ids=["gpu", "tpu", "cpu"])
def test_a_layer_of_cut_experts_ends_when_its_plan_says(beside):
    counts, resident = draw()
    curves = make_curves(beside)
    costs = dict(host=curves.host / 2, stream=jnp.float32(2.5), memory=jnp.float32(0.75))
    pieces = Pieces(count=2, curves=make_curves(beside, **costs))
    plan = jax.jit(jax.vmap(functools.partial(plan_pieces, plan_layer), (0, 0, None, None)))
    plans = plan(counts, resident, curves, pieces)
    modes = np.asarray(plans.mode)
    both = (modes == Mode.STREAM).reshape(LAYERS, EXPERTS, 2).sum(-1) == 1
    assert both.any() == (beside == (1, 1))  # what waits for the other gains nothing
    for i in range(LAYERS):
        layer = make_timeline(counts[i : i + 1], modes[i : i + 1], curves, pieces=pieces)
        assert layer.seconds == pytest.approx(float(plans.predicted[i]))
        lanes = {(s.lane, s.expert) for s in layer.spans}
        for expert in np.flatnonzero(both[i]):
            assert {("device", expert), ("link", expert), ("host", expert)} <= lanes


@pytest.mark.parametrize("beside", [(1, 1), (0, 1), (0, 0)], ids=["gpu", "tpu", "cpu"])
def test_a_lane_does_one_thing_at_a_time_and_nothing_before_it_can(beside):
    counts, resident = draw(1)
    curves = make_curves(beside)
    modes = np.asarray(plan_layers(plan_layer, counts, resident, curves).mode)
    spans = make_timeline(counts, modes, curves, 1.0).spans
    for lane in LANES:
        mine = sorted((s for s in spans if s.lane == lane), key=lambda s: s.start)
        assert all(b.start >= a.end - 1e-5 for a, b in itertools.pairwise(mine))
    ran = {(s.layer, s.expert): s for s in spans if s.lane in ("device", "host") and s.expert >= 0}
    assert set(ran) == set(map(tuple, np.argwhere(counts > 0).tolist()))
    arrived = {(s.layer, s.expert): s.end for s in spans if s.lane == "link"}
    assert set(arrived) == set(map(tuple, np.argwhere(modes == Mode.STREAM).tolist()))
    assert all(ran[key].start >= end for key, end in arrived.items())
    if beside == (0, 0):
        order = sorted((s for s in spans if s.lane != "memory"), key=lambda s: s.start)
        assert all(b.start >= a.end - 1e-5 for a, b in itertools.pairwise(order))


def test_it_draws_itself():
    counts = np.array([[4, 0, 2]])
    modes = np.array([[Mode.RESIDENT, Mode.IDLE, Mode.HOST]])
    zero = jnp.float32(0)
    curves = make_curves(host_launch=zero, memory=zero)
    line = str(make_timeline(counts, modes, curves)).splitlines()
    assert line[0] == "6e+03 ms as planned"
    assert line[1].startswith("device |" + 21 * "█") and line[1].endswith(" 33%")
    assert line[2] == "link   |" + 64 * " " + "|   0%"
    assert line[4].startswith("memory |" + 64 * " ")
    assert line[3] == "host   |" + 64 * "█" + "| 100%"


def test_an_idle_step_has_no_spans():
    none = np.zeros((2, 3), int)
    timeline = make_timeline(none, none, make_curves())
    assert timeline.spans == () and timeline.seconds == 0 and timeline.busy("host") == 0
    assert str(timeline).startswith("0 ms")
