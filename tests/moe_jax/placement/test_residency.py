import contextlib
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from moe_jax.placement.curves import CostCurves
from moe_jax.placement.policies import POLICIES
from moe_jax.placement.residency import (
    EMPTY,
    FIRST_LIFETIME,
    Swap,
    apply_swap,
    observe,
    profile_placement,
    propose_swaps,
    start_residency,
    swap_costs,
    violations,
    warm_start,
)


def make_curves(host=10.0, device=1.0, stream=100.0, memory=0.0):
    """A miss costs 10 s on the host, a hit 1 s, an upload 100 s."""
    scalar = jnp.float32
    return CostCurves(
        tokens=jnp.array([1.0, 100.0]),
        host=jnp.full(2, host, jnp.float32),
        device=jnp.full(2, device, jnp.float32),
        stream=scalar(stream),
        host_launch=scalar(0),
        link_latency=scalar(0),
        memory=scalar(memory),
    )


CURVES = make_curves()


def start(slots=((0, 1),), experts=4, policy="lru"):
    return start_residency(tuple(np.array(s, np.int64) for s in slots), experts, policy)


def step(residency, *used, tokens=1):
    """One step in which each layer uses the experts given for it."""
    counts = np.zeros(residency.used.shape, np.int64)
    for layer, experts in enumerate(used):
        counts[layer, list(experts)] = tokens
    return observe(residency, counts, counts / 2)


def after(residency, steps, *used):
    for _ in range(steps):
        residency = step(residency, *used)
    return residency


def propose(residency, curves=CURVES, most=8, idle=None, arrived=None, **options):
    if arrived is not None:
        mask = np.zeros(residency.used.shape, bool)
        mask[tuple(np.transpose(arrived))] = True
        arrived = mask
    return propose_swaps(
        residency, swap_costs(curves, overlap=True), most, idle, arrived, **options
    )


def test_what_is_used_replaces_what_is_not():
    residency = after(start(), 3, [2])
    swap = Swap(layer=0, slot=0, incoming=2, outgoing=0)
    assert propose(residency) == (swap,)  # rate 1 for 64 steps saves 9 s each, and costs 100 s
    residency = apply_swap(residency, swap)
    assert residency.slot_expert[0].tolist() == [2, 1]
    assert residency.resident.tolist() == [[False, True, True, False]]
    assert propose(residency) == ()


def test_the_rate_of_use_is_that_of_the_last_steps():
    residency = after(after(start(), 64, [0]), 64, [1])
    np.testing.assert_allclose(residency.rates, [[1 / 3, 2 / 3, 0, 0]])
    assert start().rates.tolist() == [[0, 0, 0, 0]]


# One use in each of three steps: (1 - 0) * 64 * (10 - 1) = 576 s, of which 283 s are sure: with two
# made-up steps rates are 0.8 and 0.2, their difference has a standard error of 0.25.
PAYS = {
    "an upload that costs less": (dict(stream=275.0), None, True),
    "an upload that costs more": (dict(stream=290.0), None, False),
    "more, but mostly beside other work": (dict(stream=290.0), 10.0, True),
    "limited by host memory": (dict(stream=1.0, memory=290.0), None, False),
    "a hit saves little": (dict(host=2.0), None, False),
    "a hit saves nothing": (dict(host=1.0), 1e9, False),
    "streaming is the cheaper miss": (dict(host=1e9, stream=275.0), None, True),
    "never stream": (dict(stream=np.inf), 1e9, False),
}


@pytest.mark.parametrize("name", PAYS)
def test_a_fill_must_pay_back(name):
    costs, idle, expected = PAYS[name]
    swaps = propose(after(start(), 3, [2]), make_curves(**costs), idle=idle)
    assert bool(swaps) == expected


def test_the_engine_pays_for_both_ways():
    both, one = (swap_costs(make_curves(stream=100.0), overlap) for overlap in (False, True))
    assert (both.upload, one.upload) == (200.0, 100.0)
    np.testing.assert_array_equal(both.saving, one.saving)


def test_popularity_by_chance_is_not_paid_for():
    """Experts that are all used alike: the luckiest is not worth an upload, nor ever gets one."""
    random = np.random.default_rng(0)
    residency, swaps, free = start(slots=[range(8)], experts=32, policy="lfu"), 0, 0
    for _ in range(200):
        residency = step(residency, random.choice(32, 4, replace=False))
        swaps += len(propose(residency, make_curves(stream=50.0)))
        free += len(propose(residency, make_curves(stream=50.0), most=1, idle=50.0))
    assert free > 100 > 20 > swaps


def test_what_was_streamed_anyway_costs_nothing():
    dear = make_curves(stream=1e6)
    residency = after(start(), 3, [2])
    assert propose(residency, dear) == ()
    assert propose(residency, dear, arrived=[(0, 2)]) == (
        Swap(layer=0, slot=0, incoming=2, outgoing=0),
    )


def test_the_savings_are_those_at_the_usual_number_of_tokens():
    residency = start()
    for _ in range(3):
        residency = step(residency, [2], tokens=100)
    steep = replace(CURVES, host=jnp.array([1.0, 10.0]))
    assert len(propose(residency, steep)) == 1
    assert propose(after(start(), 3, [2]), steep) == ()


def test_the_last_steps_experts_are_never_evicted():
    residency = after(start(slots=[(0,)], policy="lfu"), 9, [1])
    assert propose(step(residency, [0, 1])) == ()
    assert len(propose(step(residency, [1]))) == 1


def test_similar_rates_are_not_exchanged():
    residency = start(slots=[(0,)], experts=2)
    for _ in range(40):
        residency = step(step(residency, [0]), [1])
    assert propose(residency, idle=1e9) == ()
    assert len(propose(residency, idle=1e9, hysteresis=0.0)) == 1


def test_at_most_so_many_and_the_best_first():
    residency = start(slots=[(0, 1), (0, 1)])
    residency = after(residency, 2, [2], [3])
    residency = after(residency, 2, [3], [3])
    everything = propose(residency, idle=1e9)
    assert [(s.layer, s.incoming) for s in everything] == [(1, 3), (0, 3), (0, 2)]
    assert propose(residency, most=2, idle=1e9) == everything[:2]
    assert propose(residency, most=0) == ()


def test_idle_link_time_is_spent_once():
    residency = after(start(slots=[(0, 1)]), 3, [2, 3])
    dear = make_curves(stream=1000.0)
    assert len(propose(residency, dear, idle=1000.0)) == 1
    assert len(propose(residency, dear, idle=2000.0)) == 2


def test_free_slots_are_filled_first_each_once():
    residency = after(start(slots=[(0, EMPTY, EMPTY)]), 3, [1, 2, 3])
    swaps = propose(residency)
    assert [(s.slot, s.outgoing) for s in swaps] == [(1, EMPTY), (2, EMPTY), (0, 0)]
    for swap in swaps:
        residency = apply_swap(residency, swap)
    assert violations(residency, 4) == []
    assert sorted(residency.slot_expert[0].tolist()) == [1, 2, 3]


def test_static_never_proposes():
    residency = after(start(slots=[(0, EMPTY)], policy="static"), 9, [2, 3])
    assert propose(residency, idle=1e9, arrived=[(0, 2), (0, 3)]) == ()


def test_dense_layers_have_no_slots():
    residency = after(start(slots=[(), (0,), ()]), 3, [], [2], [])
    assert [s.layer for s in propose(residency)] == [1]
    assert violations(residency, 4, (np.zeros(0, int), np.arange(1, 4), np.zeros(0, int))) == []
    assert propose(after(start(slots=[(), ()]), 3, [], [])) == ()


def test_all_resident_has_nothing_to_propose():
    assert propose(after(start(slots=[(0, 1, 2, 3)]), 3, [2]), idle=1e9) == ()


def test_a_layer_without_slots_beside_one_with():
    assert [s.layer for s in propose(after(start(slots=[(), (0,)]), 3, [2], [2]))] == [1]


def test_lifetimes_are_learnt_from_exchanges():
    residency = after(start(), 4, [2])
    (swap,) = propose(residency)
    residency = apply_swap(residency, swap)
    assert residency.lifetime == FIRST_LIFETIME + 0.05 * (4 - FIRST_LIFETIME)
    free = after(start(slots=[(EMPTY,)]), 4, [2])
    assert apply_swap(free, propose(free)[0]).lifetime == FIRST_LIFETIME


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "static"])
def test_a_prompt_warms_up(policy):
    counts = np.array([[0, 1, 90, 9]])
    residency = warm_start(start(slots=[(0, 3)], policy=policy), counts, 100)
    np.testing.assert_allclose(residency.rates, counts / 100)
    assert residency.step == 1
    assert propose(residency)[0].incoming == 2


def test_a_long_prompt_outweighs_what_was_before_and_a_short_one_does_not():
    before = after(start(), 200, [0])
    long = warm_start(before, np.array([[0, 1000, 0, 0]]), 1000)
    short = warm_start(before, np.array([[0, 1, 0, 0]]), 1)
    np.testing.assert_allclose(long.rates[0], [0, 1, 0, 0], atol=0.01)
    np.testing.assert_allclose(short.rates[0], [1, 0, 0, 0], atol=0.02)


def test_what_is_wrong_is_named():
    residency = start(slots=[(0, 1), ()])
    broken = replace(residency, slot_expert=(np.array([3, 3, 7, EMPTY]), np.zeros(0, np.int64)))
    assert violations(broken, 4) == [
        "layer 0: expert 7 does not exist, there are 4",
        "layer 0: expert 3 is there twice",
    ]
    host = (np.array([1, 2]), np.zeros(0, np.int64))
    assert violations(residency, 4, host) == [
        "layer 0: expert 1 is there twice",
        "layer 0: expert 3 is lost",
    ]
    assert violations(residency, 4, (np.array([2, 3]), np.zeros(0, np.int64))) == []


def message(call, *arguments):
    with pytest.raises(ValueError) as error:
        call(*arguments)
    return str(error.value)


def test_errors():
    residency = start()
    assert message(start, [(0, 0)]) == (
        "no residency can start like this: layer 0: expert 0 is there twice"
    )
    assert message(start, [(0,)], 4, "fifo").startswith("no policy is called 'fifo'")
    assert message(propose_swaps, residency, swap_costs(CURVES), -1, None) == (
        "most_per_step is -1; 0 is the least, it forbids all swaps"
    )
    assert message(warm_start, residency, np.zeros((1, 4), int), 0) == (
        "a prompt of 0 tokens seeds nothing; give at least one token"
    )
    assert message(warm_start, residency, np.zeros((2, 4), int), 1) == (
        "counts have shape (2, 4), the residency has (1, 4); give every layer, with zeros in "
        "dense ones"
    )
    assert message(observe, residency, np.zeros((2, 4), int), np.zeros((2, 4))).startswith(
        "counts have shape (2, 4)"
    )


@pytest.mark.parametrize("incoming", [1, 4, -1])
def test_an_expert_that_has_a_slot_or_does_not_exist_cannot_come(incoming):
    swap = Swap(layer=0, slot=0, incoming=incoming, outgoing=0)
    assert message(apply_swap, start(), swap) == (
        f"{swap}: expert {incoming} does not exist or has a slot already; layer 0 has experts "
        "[0, 1]; propose swaps anew"
    )


@pytest.mark.parametrize("slot, outgoing", [(0, 1), (2, 0), (-1, 1)])
def test_a_slot_must_hold_what_goes(slot, outgoing):
    swap = Swap(layer=0, slot=slot, incoming=2, outgoing=outgoing)
    assert message(apply_swap, start(), swap) == (
        f"{swap}: that slot does not hold expert {outgoing}; layer 0 has experts [0, 1]; "
        "propose swaps anew"
    )


def test_a_swap_is_not_applied_twice():
    residency = after(start(), 3, [2])
    (swap,) = propose(residency)
    assert "does not hold" in message(apply_swap, apply_swap(residency, swap), swap)


def test_a_profile_places_the_most_used():
    counts = np.array([[1, 5, 5, 7], [0, 0, 0, 0], [3, 0, 0, 4]])
    placed = profile_placement(counts, (2, 0, 1))
    assert [experts.tolist() for experts in placed] == [[1, 3], [], [3]]
    assert message(profile_placement, counts, (1, 5, 1)) == (
        "slots (1, 5, 1) do not fit 3 layers with 4 experts; give one number from 0 to the "
        "experts for each layer"
    )


class Swapping(RuleBasedStateMachine):
    """Steps, prompts and swaps in any order, some swaps left out as after an interrupt.

    The host holds what is not on the device, each expert once. A swap first tries the record,
    then exchanges: if the record refuses, nothing was moved.
    """

    experts = 6

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        slots=st.tuples(st.integers(0, 6), st.integers(0, 6)),
        free=st.booleans(),
    )
    def begin(self, policy, slots, free):
        here = [np.arange(count) for count in slots]
        if free:
            here = [np.where(s % 2 == 1, EMPTY, s) for s in here]
        self.residency = start_residency(tuple(here), self.experts, policy)
        self.host = [sorted(set(range(self.experts)) - set(s.tolist())) for s in here]
        self.tried = []

    @rule(bits=st.lists(st.integers(0, 2), min_size=12, max_size=12))
    def one_step(self, bits):
        counts = np.array(bits).reshape(2, 6)
        self.residency = observe(self.residency, counts, counts / 2)

    @rule(bits=st.lists(st.integers(0, 5), min_size=12, max_size=12))
    def prompt(self, bits):
        self.residency = warm_start(self.residency, np.array(bits).reshape(2, 6), 5)

    @rule(most=st.integers(0, 5), keep=st.integers(0, 5), arrived=st.booleans())
    def swap(self, most, keep, arrived):
        mask = self.residency.used if arrived else None
        swaps = propose_swaps(self.residency, swap_costs(CURVES), most, 500.0, mask)
        assert len(swaps) <= most
        assert self.residency.policy.moves or not swaps
        assert not any(self.residency.used[s.layer, s.outgoing] for s in swaps if s.outgoing >= 0)
        for swap in swaps[:keep]:  # the others never happen: interrupted
            self.carry_out(swap)

    @rule(
        layer=st.integers(0, 1),
        slot=st.integers(0, 5),
        incoming=st.integers(-1, 6),
        outgoing=st.integers(-1, 5),
    )
    def any_swap(self, **fields):
        with contextlib.suppress(ValueError):
            self.carry_out(Swap(**fields))

    def carry_out(self, swap):
        residency = apply_swap(self.residency, swap)
        host = self.host[swap.layer]
        host.remove(swap.incoming)
        if swap.outgoing != EMPTY:
            host.append(swap.outgoing)
        self.residency = residency

    @invariant()
    def no_expert_is_lost_or_doubled(self):
        if hasattr(self, "residency"):
            host = tuple(np.array(h, np.int64) for h in self.host)
            assert violations(self.residency, self.experts, host) == []


Swapping.TestCase.settings = settings(
    max_examples=30, stateful_step_count=20, derandomize=True, deadline=None
)
TestSwapping = Swapping.TestCase
