"""Thousands of random instances against every way to split the missing experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, plan_layer

EXPERTS = 10
MOST_TOKENS = 16
INSTANCES = 3000
SUBSETS = (np.arange(2**EXPERTS)[:, None] >> np.arange(EXPERTS) & 1).astype(bool)


def draw(seed, flat_device, beside):
    """Whole numbers, so that float32 is exact and ties are frequent."""
    random = np.random.default_rng(seed)
    whole = lambda high, *shape: random.integers(0, high, (INSTANCES, *shape)).astype(np.float32)
    device = whole(6, 1 if flat_device else MOST_TOKENS)
    device = np.broadcast_to(device, (INSTANCES, MOST_TOKENS))
    curves = CostCurves(
        tokens=np.tile(np.arange(1, MOST_TOKENS + 1, dtype=np.float32), (INSTANCES, 1)),
        host=np.cumsum(whole(4, MOST_TOKENS), axis=1),
        device=device if flat_device else np.cumsum(device > 3, axis=1).astype(np.float32),
        stream=whole(12),
        host_launch=whole(4),
        link_latency=whole(4),
        memory=whole(8),
        host_beside=np.full(INSTANCES, beside[0], np.float32),
        link_beside=np.full(INSTANCES, beside[1], np.float32),
    )
    counts = random.integers(0, MOST_TOKENS + 1, (INSTANCES, EXPERTS))
    counts *= random.random((INSTANCES, EXPERTS)) < 0.8
    return counts.astype(np.int32), random.random((INSTANCES, EXPERTS)) < 0.25, curves


def best_of_all(counts, resident, curves, i):
    """The least makespan over all 1024 subsets of experts, those of missing ones counting."""
    read = lambda curve: np.where(counts > 0, curve[i][np.maximum(counts, 1) - 1], 0)
    host, device = read(curves.host), read(curves.device)
    missing = (counts > 0) & ~resident
    subsets = SUBSETS[~(SUBSETS & ~missing).any(axis=1)]
    left = missing & ~subsets
    on_host = left @ host + left.any(axis=1) * curves.host_launch[i]
    busy = device[resident].sum()
    arrival = np.full(len(subsets), curves.link_latency[i])
    end = np.zeros(len(subsets))
    for e in np.argsort(-counts, kind="stable"):
        arrival = arrival + subsets[:, e] * curves.stream[i]
        end = np.where(subsets[:, e], np.maximum(end, arrival) + device[e], end)
    on_device = busy + subsets @ device
    beside = np.maximum(end, on_device)
    behind = on_device + arrival * subsets.any(axis=1)
    together = beside if curves.link_beside[i] else behind
    total = np.maximum(on_host, together) if curves.host_beside[i] else on_host + together
    return np.maximum(total, missing.sum() * curves.memory[i]).min()


@pytest.mark.parametrize("beside", [(1, 1), (0, 1), (0, 0)], ids=["all", "tpu", "cpu"])
@pytest.mark.parametrize("flat_device", [True, False], ids=["flat", "rising"])
def test_no_split_of_ten_experts_is_better(flat_device, beside):
    counts, resident, curves = draw(0, flat_device, beside)
    plans = jax.jit(jax.vmap(plan_layer))(counts, resident, jax.tree.map(jnp.asarray, curves))
    best = np.array([best_of_all(counts[i], resident[i], curves, i) for i in range(INSTANCES)])
    assert (np.asarray(plans.lower_bound) <= best).all()
    if flat_device:
        np.testing.assert_array_equal(plans.predicted, best)
    else:  # the device curve breaks the theorem's assumption: the bound says by how much
        assert (np.asarray(plans.predicted) >= best).all()
        spread = curves.device.max(axis=1) - curves.device.min(axis=1)
        assert (np.asarray(plans.predicted) <= best + spread * (counts > 0).sum(axis=1)).all()
    missing = (counts > 0) & ~resident
    split = (np.asarray(plans.mode) == Mode.STREAM) | (np.asarray(plans.mode) == Mode.HOST)
    np.testing.assert_array_equal(split, missing)
