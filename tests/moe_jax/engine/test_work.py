"""The work of a step is that of the full model of its layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.engine.work import busy_seconds, work_costs
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode
from moe_jax.placement.rules import resource_seconds

EXPERTS, MOST = 5, 20
CURVES = CostCurves(
    tokens=jnp.array([1.0, 4.0, 8.0]),
    host=jnp.array([2.0, 3.0, 9.0]),
    device=jnp.array([1.0, 1.0, 2.0]),
    stream=jnp.float32(5),
    host_launch=jnp.float32(0.5),
    link_latency=jnp.float32(0.25),
    memory=jnp.float32(0.125),
)
COSTS = work_costs(CURVES, MOST)
whole = jax.jit(jax.vmap(resource_seconds, in_axes=(0, 0, None)))


def layers(values):
    row = st.lists(values, min_size=EXPERTS, max_size=EXPERTS)
    return st.lists(row, min_size=2, max_size=2)


@given(layers(st.integers(0, MOST)), layers(st.sampled_from([1, 2, 3])))
def test_busy_seconds_are_those_of_the_full_model(counts, modes):
    counts = np.asarray(counts, np.int32)
    modes = np.where(counts > 0, np.asarray(modes, np.int32), Mode.IDLE)
    full = whole(modes, counts, CURVES)
    expected = {
        "device": full.work.sum(),
        "link": full.link.sum(),
        "host": full.host.sum(),
        "memory": full.memory.sum(),
    }
    assert busy_seconds(modes, counts, COSTS) == pytest.approx(
        {lane: float(seconds) for lane, seconds in expected.items()}, rel=1e-5
    )


@pytest.mark.parametrize("forbidden", [Mode.STREAM, Mode.HOST])
def test_ways_that_are_never_used_may_cost_infinity(forbidden):
    never = {"stream": jnp.float32(np.inf)}
    if forbidden == Mode.HOST:
        never = {"host": jnp.full(3, np.inf, jnp.float32)}
    costs = work_costs(CostCurves(**(vars(CURVES) | never)), MOST)
    counts = np.array([[1, 0, 2, 0, 0]])
    other = Mode.HOST if forbidden == Mode.STREAM else Mode.STREAM
    allowed = np.array([[other, 0, Mode.RESIDENT, 0, 0]])
    assert np.isfinite(list(busy_seconds(allowed, counts, costs).values())).all()
    wrong = np.array([[forbidden, 0, Mode.RESIDENT, 0, 0]])
    assert not np.isfinite(list(busy_seconds(wrong, counts, costs).values())).all()
