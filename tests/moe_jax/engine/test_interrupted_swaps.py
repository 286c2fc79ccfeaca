"""Interrupts and failures anywhere in a swap: every expert is where the bookkeeping says it is."""

import contextlib
import copy
import signal
from dataclasses import dataclass, replace
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

import moe_jax
from moe_jax.engine import mover as mover_module
from moe_jax.engine import runner as runner_module
from moe_jax.engine import swap as swap_module
from moe_jax.engine.runner import StepReport
from moe_jax.engine.sizing import device_memory_for
from moe_jax.engine.swap import violations
from moe_jax.model.experts import ExpertBank
from moe_jax.model.tally import Tally
from moe_jax.placement.residency import Swap, apply_swap, start_residency

SIZES = {"dtype": "float32", "max_tokens": 64, "max_seqs": 1}
LAYERS, EXPERTS, SLOTS = (0, 2), 4, 2  # those with experts; how many in each, and on the device
FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 6144 bytes."

# What one swap of the mover calls once, in the module that calls it.
CALLS: dict[str, ModuleType] = {
    "apply_swap": mover_module,
    "swap_experts": runner_module,
    "to_device": swap_module,
    "to_host": swap_module,
    "sharding": swap_module,
    "store_expert": swap_module,
    "LayerExperts": swap_module,
}
TAKE_MEMORY = ("to_device", "to_host", "sharding", "store_expert")


@dataclass(frozen=True)
class Fault:
    """An interrupt, or that memory is full, in a call of a function or right after it.

    `swap` counts those of a step from 0.
    """

    name: str
    swap: int
    after: bool
    interrupts: bool

    def can_be_borne(self) -> bool:
        """Whether the engine can go on: not if a bank was given up and is returned to nobody."""
        return self.interrupts or not (self.name == "store_expert" and self.after)


def faults():
    swaps, sides = st.integers(0, 2), st.booleans()
    interrupts = st.builds(Fault, st.sampled_from(list(CALLS)), swaps, sides, st.just(True))
    failures = st.builds(Fault, st.sampled_from(TAKE_MEMORY), swaps, sides, st.just(False))
    return st.none() | interrupts | failures.filter(Fault.can_be_borne)


@contextlib.contextmanager
def happening(fault):
    """Lets a fault happen; yields a list of those that did."""
    happened: list[Fault] = []
    if fault is None:
        yield happened
        return
    module = CALLS[fault.name]
    original, calls = getattr(module, fault.name), []

    def strike():
        happened.append(fault)
        if not fault.interrupts:
            raise RuntimeError(FULL)
        signal.raise_signal(signal.SIGINT)

    def struck(*arguments, **named):
        calls.append(fault.name)
        here = len(calls) == fault.swap + 1
        if here and not fault.after:
            strike()
        result = original(*arguments, **named)
        if here and fault.after:
            strike()
        return result

    with mock.patch.object(module, fault.name, struck):
        yield happened


def outcome(call, *arguments):
    """The error, or the interrupt, that comes out of a call."""
    try:
        call(*arguments)
    except (KeyboardInterrupt, RuntimeError) as error:
        return type(error)
    return None


def weights(experts):
    """The bytes of each expert's two arrays, found by its address."""
    found = []
    for address in np.asarray(experts.address):
        if address >= experts.slots:
            pair, kind = experts.host[address - experts.slots], "pinned_host"
        elif isinstance(experts.resident, ExpertBank):
            pair, kind = tuple(bank[address] for bank in experts.resident), "device"
        else:
            pair, kind = experts.resident[address], "device"
        assert {array.sharding.memory_kind for array in pair} == {kind}
        found.append([np.asarray(array).tobytes() for array in pair])
    return found


def residents(model):
    """Per layer, the experts in its slots, as the arrays say."""
    layers = [layer.experts for layer in model.layers]
    return tuple(
        np.zeros(0, np.int64) if e is None else np.argsort(np.asarray(e.address))[: e.slots]
        for e in layers
    )


def same_slots(some, others):
    assert [experts.tolist() for experts in some] == [experts.tolist() for experts in others]


def with_own_banks(model):
    """The model, of which everything that can be donated is a copy."""
    layers = []
    for layer in model.layers:
        if layer.experts is not None:
            resident = jax.tree.map(jnp.copy, layer.experts.resident)
            layer = replace(layer, experts=replace(layer.experts, resident=resident))
        layers.append(layer)
    return replace(model, layers=tuple(layers))


PICKS = st.tuples(
    st.sampled_from(LAYERS), st.integers(0, SLOTS - 1), st.integers(0, EXPERTS - SLOTS - 1)
)


class Swapping(RuleBasedStateMachine):
    """Swaps by the runner and by the mover, with a fault in any of them."""

    def __init__(self, engine):
        super().__init__()
        self.runner, self.pristine = engine._loop.runner, engine._loop.runner.model
        self.expected = {i: weights(self.pristine.layers[i].experts) for i in LAYERS}
        tally = Tally.empty(len(self.pristine.layers), EXPERTS)
        self.report = StepReport(tokens=1, max_query_length=1, compiled=False, tally=tally)
        self.mover = copy.copy(engine._observer.mover)

    @initialize()
    def begin(self):
        self.runner.model = with_own_banks(self.pristine)
        self.mover.residency = start_residency(residents(self.pristine), EXPERTS, "lru")

    def teardown(self):
        self.runner.model = self.pristine

    def swap_of(self, residency, pick):
        layer, slot, which = pick
        here = residency.slot_expert[layer].tolist()
        missing = [expert for expert in range(EXPERTS) if expert not in here]
        return Swap(layer=layer, slot=slot, incoming=missing[which], outgoing=here[slot])

    @rule(pick=PICKS, fault=faults())
    def by_runner(self, pick, fault):
        swap = self.swap_of(self.mover.residency, pick)
        with happening(fault) as happened:
            error = outcome(self.runner.swap, swap.layer, swap.incoming, swap.outgoing)
        if not happened:
            assert error is None
        else:
            assert error is (KeyboardInterrupt if fault.interrupts else RuntimeError)
        if error is not RuntimeError:
            self.mover.residency = apply_swap(self.mover.residency, swap)

    @rule(picks=st.lists(PICKS, min_size=1, max_size=3), fault=faults())
    def by_mover(self, picks, fault):
        swaps, after = [], [self.mover.residency]
        for pick in picks:
            swaps.append(self.swap_of(after[-1], pick))
            after.append(apply_swap(after[-1], swaps[-1]))
        made, failed = self.mover.swaps, self.mover.failures
        with (
            mock.patch.object(mover_module, "propose_swaps", lambda *_: swaps),
            mock.patch.object(mover_module, "PAUSE", 0),
            happening(fault) as happened,
        ):
            error = outcome(self.mover.after_step, [self.report], 0)
        made, failed = self.mover.swaps - made, self.mover.failures - failed
        assert error is (KeyboardInterrupt if happened and fault.interrupts else None)
        assert failed == (1 if happened and not fault.interrupts else 0)
        if not happened:
            assert made == len(swaps)
        else:
            # An interrupt waits for the end of the swap, if it has begun; a failure undoes it.
            begun = fault.interrupts and fault.name != "apply_swap"
            assert made == fault.swap + begun
        same_slots(self.mover.residency.slot_expert, after[made].slot_expert)

    @invariant()
    def every_expert_is_where_the_bookkeeping_says(self):
        for layer in LAYERS:
            experts = self.runner.model.layers[layer].experts
            assert violations(experts) == []
            assert weights(experts) == self.expected[layer]
        same_slots(residents(self.runner.model), self.mover.residency.slot_expert)


def load_half(folder):
    budget = device_memory_for(folder, experts=SLOTS / EXPERTS, **SIZES)
    return moe_jax.load(folder, device_memory=budget, residency="lru", max_swaps=2, **SIZES)


@pytest.mark.parametrize("layout", ["separate", "bank"])
def test_no_fault_in_a_swap_loses_or_doubles_an_expert(tiny, layout, request):
    if layout == "bank":
        request.getfixturevalue("banks")
    engine = load_half(tiny)
    resident = engine._loop.runner.model.layers[0].experts.resident
    assert isinstance(resident, ExpertBank) == (layout == "bank")
    run_state_machine_as_test(
        lambda: Swapping(engine),
        settings=settings(max_examples=60, stateful_step_count=8, derandomize=True, deadline=None),
    )


def test_an_engine_that_has_lost_a_bank_says_so(tiny, banks, monkeypatch):
    """Nothing brings back what was given up and is returned to nobody."""
    machine = Swapping(load_half(tiny))
    machine.begin()
    swap = machine.swap_of(machine.mover.residency, (0, 1, 0))
    monkeypatch.setattr(mover_module, "propose_swaps", lambda *_: [swap])
    message = f"experts of layer 0 were lost when expert 2 was to replace 1: {FULL}; load the model"
    with (
        happening(Fault("store_expert", 0, after=True, interrupts=False)),
        pytest.raises(RuntimeError, match=message),
    ):
        machine.mover.after_step([machine.report], 0)
    machine.teardown()
