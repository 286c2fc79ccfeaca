"""Planners that run all missing experts in one way."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.forced import force, force_planner, streaming_can_pay
from moe_jax.placement.planner import Mode, plan_layer
from moe_jax.placement.rules import host_all, stream_all

CURVES = CostCurves(
    tokens=jnp.array([1.0, 2.0]),
    host=jnp.array([4.0, 5.0]),
    device=jnp.array([1.0, 1.0]),
    stream=jnp.float32(2),
    host_launch=jnp.float32(0.5),
    link_latency=jnp.float32(0.25),
    memory=jnp.float32(0),
)
COUNTS, RESIDENT = jnp.array([1, 2, 0, 1]), jnp.array([True, False, False, False])


def test_costs_of_the_other_way_are_infinite():
    assert force(CURVES, "auto") is CURVES and force_planner(plan_layer, "auto") is plan_layer
    assert np.isinf(force(CURVES, "stream").host).all()
    assert np.isinf(force(CURVES, "host").stream)
    assert np.isfinite(force(CURVES, "host").host).all()


@pytest.mark.parametrize("planner", [plan_layer, host_all, stream_all])
@pytest.mark.parametrize("missing, mode", [("stream", Mode.STREAM), ("host", Mode.HOST)])
def test_every_missing_expert_runs_in_that_way(planner, missing, mode):
    plan = force_planner(planner, missing)(COUNTS, RESIDENT, CURVES)
    assert plan.mode.tolist() == [Mode.RESIDENT, mode, Mode.IDLE, mode]
    assert plan.streams == (2 if missing == "stream" else 0)


@pytest.mark.parametrize("planner", [plan_layer, stream_all])
def test_what_it_takes_is_predicted(planner):
    assert force_planner(planner, "host")(COUNTS, RESIDENT, CURVES).predicted == 9.5


def serial(**costs):
    never = jnp.float32(0)
    return replace(CURVES, host_beside=never, link_beside=never, **costs)


@pytest.mark.parametrize(
    "curves, pays",
    [
        (serial(), True),  # 2 + 1 against 0.5 + 4
        (serial(host=jnp.array([2.0, 2.5])), False),
        (serial(host=jnp.array([2.0, 3.0])), True),  # for two tokens only
        (serial(stream=jnp.float32(np.inf)), False),
        (replace(CURVES, stream=jnp.float32(np.inf)), True),
        (replace(serial(stream=jnp.float32(9)), link_beside=jnp.float32(1)), True),
    ],
)
def test_where_one_thing_is_done_after_the_other_streaming_may_never_pay(curves, pays):
    assert streaming_can_pay(curves) == pays
    streams = [plan_layer(jnp.array([n]), jnp.array([False]), curves).streams for n in (1, 2)]
    assert pays or not any(streams)
