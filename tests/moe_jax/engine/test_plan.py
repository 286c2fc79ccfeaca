"""The plan names what limits the speed, and prints which layers have how many experts."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.engine.initial_placement import InitialPlacement
from moe_jax.engine.plan import make_plan
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.memory_plan import MemoryPlan

DEFAULT = {"host": 4.0, "stream": 8.0, "memory": 1.0, "host_beside": 1.0}


def plan_of(slots, experts=4, hits=0.5, dense_bytes=300, **costs):
    """A model in which a resident expert costs 1 s, for tokens that choose two experts."""
    costs = DEFAULT | costs
    moe = tuple(count is not None for count in slots)
    config = ModelConfig(
        family="mixtral",
        vocab=16,
        embed=8,
        dense_ffn=8,
        attention=AttentionConfig(heads=2, kv_heads=1, head_dim=4),
        moe=MoEConfig(num_experts=experts, experts_per_token=2, ffn=4),
        rope=RopeConfig(),
        moe_layers=moe,
        windows=(None,) * len(slots),
        max_positions=64,
    )
    memory = MemoryPlan(
        device_bytes=10**6,
        dense_bytes=dense_bytes,
        max_tokens=64,
        kv_pages=1,
        kv_bytes=1,
        workspace_bytes=1,
        expert_bytes=100,
        host_expert_bytes=100,
        slots=tuple(count or 0 for count in slots),
        experts=tuple(experts if has else 0 for has in moe),
        host_bytes=10**6,
    )
    curves = CostCurves(
        tokens=jnp.array([1.0]),
        host=jnp.array([costs["host"]]),
        device=jnp.array([1.0]),
        stream=jnp.float32(costs["stream"]),
        host_launch=jnp.float32(0),
        link_latency=jnp.float32(0),
        memory=jnp.float32(costs["memory"]),
        host_beside=jnp.float32(costs["host_beside"]),
    )
    placed = InitialPlacement(
        slot_expert=tuple(np.arange(count or 0) for count in slots),
        hits=tuple(hits if has else 0.0 for has in moe),
        source="uniform",
    )
    return make_plan(config, memory, placed, curves, "cpu")


@pytest.mark.parametrize(
    "limit, options",
    [
        ("dense weights", {"dense_bytes": 5000}),
        ("experts on the device", {"slots": (4, 4), "dense_bytes": 0}),
        ("host", {"dense_bytes": 0}),
        ("link", {"host": np.inf}),
        ("memory", {"memory": 20.0}),
        ("memory", {"memory": 20.0, "host_beside": 0.0}),
        ("host", {"memory": 4.5, "host_beside": 0.0, "dense_bytes": 0}),  # 4 s and 1 s
    ],
)
def test_what_has_the_most_to_do_limits(limit, options):
    assert plan_of(**({"slots": (2, 2)} | options)).limit == limit


def test_seconds_add_up_over_the_layers():
    plan = plan_of((2, None, 1, 2), host=4.0)
    # Of every layer's two experts one on average is resident, the other runs on the host; the dense
    # weights are as big as three experts.
    expected = {"dense weights": 3, "experts on the device": 3, "link": 0, "host": 12, "memory": 3}
    assert plan.seconds == pytest.approx(expected, rel=1e-5)
    # With two of four slots, a token misses both times, once or never in 1, 4 and 1 of 6 cases;
    # with one, and every second choice a hit, always once.
    layers = 2 * (8 + 4 * 4 + 2) / 6 + 4
    assert plan.tokens_per_second == pytest.approx(1 / (3 + layers), rel=1e-5)


@pytest.mark.parametrize("hits, on_host", [(0.0, 8), (0.3, 5.6), (0.9, 0.8), (1.0, 0)])
def test_hits_are_those_of_the_placement(hits, on_host):
    assert plan_of((2,), hits=hits).seconds["host"] == pytest.approx(on_host, abs=1e-4)


def test_each_slot_more_is_worth_something():
    rates = [plan_of((slots,), hits=slots / 4).tokens_per_second for slots in range(5)]
    assert rates == sorted(set(rates))


def test_shares_that_cannot_be_are_bounded_by_the_slots():
    device = lambda slots, hits: plan_of((slots,), hits=hits).seconds["experts on the device"]
    assert device(1, 1.0) == pytest.approx(1)
    assert device(4, 0.0) == pytest.approx(2)


@pytest.mark.parametrize(
    "slots, lines",
    [
        ((2, 2, 2, 1), ["  layers 0-2:  2 of 4 resident", "  layer 3:     1 of 4 resident"]),
        ((None, 2, 2), ["  layer 0:     dense", "  layers 1-2:  2 of 4 resident"]),
        ((2, 2, None, 2), ["  layers 0-1, 3: 2 of 4 resident", "  layer 2:     dense"]),
        (
            (None, 2) * 8,
            ["  8 layers from 0 to 14: dense", "  8 layers from 1 to 15: 2 of 4 resident"],
        ),
    ],
)
def test_layers_alike_stand_on_one_line(slots, lines):
    text = str(plan_of(slots)).splitlines()
    first = text.index("placement      uniform") + 1
    assert text[first : first + len(lines)] == lines
