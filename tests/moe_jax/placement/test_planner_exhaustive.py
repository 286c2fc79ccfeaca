"""Thousands of random instances against every way to split the missing experts, and every rule."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, plan_layer
from moe_jax.placement.rules import fiddler, host_all, stream_all

EXPERTS = 10
MOST_TOKENS = 16
INSTANCES = 3000
forms = pytest.mark.parametrize(
    "beside", [(1, 1), (0, 1), (1, 0), (0, 0)], ids=["all", "tpu", "link", "cpu"]
)
SUBSETS = (np.arange(2**EXPERTS)[:, None] >> np.arange(EXPERTS) & 1).astype(bool)


def draw(seed, device, beside, instances=INSTANCES):
    """Whole numbers, so that float32 is exact and ties are frequent.

    The device's curve is flat, rises slowly, rises as steeply as the host's, or is any, as is the
    host's then.
    """
    random = np.random.default_rng(seed)
    whole = lambda high, *shape: random.integers(0, high, (instances, *shape)).astype(np.float32)
    shape = instances, MOST_TOKENS
    host = np.cumsum(whole(4, MOST_TOKENS), axis=1)
    device, host = {
        "flat": lambda: (np.broadcast_to(whole(6, 1), shape), host),
        "rising": lambda: (np.cumsum(whole(6, MOST_TOKENS) > 3, axis=1, dtype=np.float32), host),
        "steep": lambda: (np.cumsum(whole(4, MOST_TOKENS), axis=1), host),
        "any": lambda: (whole(20, MOST_TOKENS), whole(40, MOST_TOKENS)),
    }[device]()
    curves = CostCurves(
        tokens=np.tile(np.arange(1, MOST_TOKENS + 1, dtype=np.float32), (instances, 1)),
        host=host,
        device=device,
        stream=whole(12),
        host_launch=whole(4),
        link_latency=whole(4),
        memory=whole(8),
        host_beside=np.full(instances, beside[0], np.float32),
        link_beside=np.full(instances, beside[1], np.float32),
    )
    counts = random.integers(0, MOST_TOKENS + 1, (instances, EXPERTS))
    counts *= random.random((instances, EXPERTS)) < 0.8
    return counts.astype(np.int32), random.random((instances, EXPERTS)) < 0.25, curves


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


def planned(counts, resident, curves, planner=plan_layer):
    return jax.jit(jax.vmap(planner))(counts, resident, jax.tree.map(jnp.asarray, curves))


def best_of_each(counts, resident, curves):
    return np.array([best_of_all(counts[i], resident[i], curves, i) for i in range(len(counts))])


@forms
@pytest.mark.parametrize("device", ["flat", "rising", "steep"])
def test_no_split_of_ten_experts_is_better(device, beside):
    counts, resident, curves = draw(0, device, beside)
    plans = planned(counts, resident, curves)
    best, seconds = best_of_each(counts, resident, curves), np.asarray(plans.predicted)
    assert (np.asarray(plans.lower_bound) <= best).all()
    if device == "flat" or beside == (0, 0):
        np.testing.assert_array_equal(seconds, best)
    else:
        assert (best <= seconds).all()
        assert (seconds <= 1.3 * best).all()  # 1.5 in the order of falling counts alone
    missing = (counts > 0) & ~resident
    split = (np.asarray(plans.mode) == Mode.STREAM) | (np.asarray(plans.mode) == Mode.HOST)
    np.testing.assert_array_equal(split, missing)


def test_a_rising_device_curve_costs_no_more_than_its_spread():
    """Theorem 2: T <= T* + g_max - g_min if all g <= rho * stream and d_R <= (1 - rho) * T*."""
    counts, resident, curves = draw(1, "rising", (1, 1))
    curves = replace(curves, stream=curves.stream + curves.device.max(axis=1))
    best = best_of_each(counts, resident, curves)
    seconds = np.take_along_axis(curves.device, np.maximum(counts, 1) - 1, axis=1)
    missing = (counts > 0) & ~resident
    longest = np.where(missing, seconds, 0).max(axis=1)
    spread = longest - np.where(missing, seconds, np.inf).min(axis=1)
    residents = np.where((counts > 0) & resident, seconds, 0).sum(axis=1)
    rho = longest / np.maximum(curves.stream, 1)
    met = missing.any(axis=1) & (rho < 1) & (residents <= (1 - rho) * best)
    assert met.sum() > INSTANCES / 4
    predicted = np.asarray(planned(counts, resident, curves).predicted)
    assert (predicted <= best + spread)[met].all()


@forms
@pytest.mark.parametrize("max_streams", [None, 3])
@pytest.mark.parametrize("device", ["steep", "any"])
def test_no_rule_is_better_for_any_curves(device, max_streams, beside):
    instances = draw(2, device, beside, instances=20_000)
    limit = partial(partial, max_streams=max_streams)
    best = np.asarray(planned(*instances, limit(plan_layer)).predicted)
    for rule in (fiddler, stream_all, host_all):
        assert (best <= planned(*instances, limit(rule)).predicted).all()
