"""Measured steps beside predicted ones, by resource."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.engine.monitor import Monitor, StepTime
from moe_jax.engine.runner import StepReport
from moe_jax.engine.stats import Stats, StepTimes
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.planner import LayerPlan, Mode

MEMORY = MemoryPlan(
    device_bytes=0,
    dense_bytes=300,
    max_tokens=64,
    kv_pages=0,
    kv_bytes=0,
    workspace_bytes=0,
    expert_bytes=100,
    host_expert_bytes=100,
    slots=(1,),
    experts=(4,),
    host_bytes=0,
)
CURVES = CostCurves(
    tokens=jnp.array([1.0, 2.0]),
    host=jnp.array([8.0, 9.0]),
    device=jnp.array([1.0, 1.0]),
    stream=jnp.float32(4),
    host_launch=jnp.float32(0.5),
    link_latency=jnp.float32(0.25),
    memory=jnp.float32(3),
)
# The dense weights are as big as three experts, so they take 3 s.
DENSE = 3.0
# One resident, one streamed, two on the host: 2 s, 4.25 s, 17 s and 9 s of work.
MODES = [Mode.RESIDENT, Mode.STREAM, Mode.HOST, Mode.HOST]


def report(predicted=17.5, compiled=False, tokens=1):
    plan = LayerPlan(
        mode=jnp.asarray([mode.value for mode in MODES], jnp.int32),
        streams=jnp.int32(1),
        predicted=jnp.float32(predicted),
        lower_bound=jnp.float32(14),
    )
    counts = jnp.ones(4, jnp.int32)
    tally = Tally.empty(1, 4).after_experts(plan, counts, counts.astype(jnp.float32))
    return StepReport(tokens, 1, compiled, tally)


def decode(monitor, seconds, **options):
    monitor.after_step(StepTime(1, 0, 1, seconds), [report(**options)])


def test_work_is_predicted_by_resource_and_corrected_like_the_step():
    monitor = Monitor(MEMORY, CURVES)
    decode(monitor, 41.0)  # twice what the curves say: 3 + 17.5
    decode(monitor, 43.0)
    times = monitor.stats(Counter()).decode_times
    assert vars(times) == pytest.approx(
        {
            "steps": 1,
            "measured": 43,
            "predicted": 2 * (DENSE + 17.5),
            "device": 2 * (DENSE + 2),
            "link": 2 * 4.25,
            "host": 2 * 16.5,
            "memory": 2 * 9,
        }
    )
    assert times.exposed_waiting == pytest.approx(2 * 15.5)
    assert times.measured_less_device == pytest.approx(43 - 10)
    assert monitor.stats(Counter()).exposed_waiting == pytest.approx(2 * 15.5)


def test_steps_without_a_prediction_are_counted_but_not_compared():
    monitor = Monitor(MEMORY, CURVES)
    decode(monitor, 500.0, compiled=True)
    decode(monitor, 41.0)
    decode(monitor, 41.0, tokens=2)  # the first of another kind
    monitor.after_other([report()])
    stats = monitor.stats(Counter())
    assert stats.decode_times == stats.prefill_times == StepTimes()
    assert (stats.resident, stats.streamed, stats.hosted) == (4, 4, 8)
    assert stats.decode_seconds == 582 and stats.predicted_seconds == 4 * 17.5
    assert stats.compiled_seconds == 500
    assert "/s, 500 s of it in steps that compiled a program | experts" in str(stats)


def test_what_cannot_be_foreseen_is_not_compared():
    monitor = Monitor(MEMORY, CURVES)
    for _ in range(2):
        decode(monitor, 41.0)
    decode(monitor, 41.0, predicted=np.inf)
    assert monitor.stats(Counter()).decode_times.steps == 1


def test_a_prefill_of_several_chunks_is_one_step():
    monitor = Monitor(MEMORY, CURVES)
    for _ in range(2):
        monitor.after_step(StepTime(2, 2, 1, 41.0), [report(), report()])
    stats = monitor.stats(Counter())
    assert stats.prefill_times.steps == 1 and stats.decode_times.steps == 0
    assert stats.prefill_times.predicted == pytest.approx(41)
    assert stats.prefill_times.link == pytest.approx(2 * 4.25)


def test_the_certificate_of_the_plans_that_ran():
    monitor = Monitor(MEMORY, CURVES)
    assert monitor.stats(Counter()).plan_excess is None
    decode(monitor, 41.0)
    decode(monitor, 41.0, predicted=14.0)
    stats = monitor.stats(Counter())
    assert stats.plan_excess == pytest.approx(31.5 / 28 - 1)
    assert "| plans within 12.5% of the best possible" in str(stats)
    decode(monitor, 41.0, predicted=np.inf)
    assert "best possible" not in str(monitor.stats(Counter()))


def test_totals_of_a_part_and_the_text():
    before = Stats(swapped=1, expert_bytes=100, decode_times=StepTimes(steps=1, measured=1.0))
    times = StepTimes(steps=3, measured=4.0, predicted=5.0, device=2.0, host=3.0)
    after = Stats(swapped=3, streamed=4, hosted=5, expert_bytes=100, decode_times=times)
    spent = after.since(before)
    assert spent.decode_times == StepTimes(
        steps=2, measured=3.0, predicted=5.0, device=2.0, host=3.0
    )
    assert (spent.bytes_streamed, spent.bytes_returned, spent.bytes_hosted) == (600, 200, 500)
    first, last = str(spent).splitlines()
    assert "moved 600 B to the device" in first
    assert last == (
        "2 decode steps: measured 3 s, predicted 5 s | predicted work: device 2 s, link 0 s, "
        "host 3 s, memory 0 s | device waits 3 s as predicted, 1 s measured beyond its work"
    )
