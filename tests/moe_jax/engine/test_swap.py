"""Experts change places: none is lost or doubled, and results stay the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_jax
from host_offload.memory import sharding
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.sizing import device_memory_for
from moe_jax.engine.swap import store_expert, swap_experts, violations
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from tests.tolerances import assert_close

EXPERTS = 5
SIZES = {"dtype": "float32", "max_tokens": 64, "max_seqs": 1}
TOKENS = np.random.default_rng(5).integers(1, 300, 20)


def make_layer(slots, bank):
    """Expert e holds the number e everywhere."""
    one = lambda e, kind: Expert(
        *(jax.device_put(np.full(s, e, np.float32), sharding(kind)) for s in ((4, 3), (3, 2)))
    )
    resident = tuple(one(e, "device") for e in range(slots))
    if bank:
        resident = ExpertBank(*(jnp.stack(arrays) for arrays in zip(*resident, strict=True)))
    return LayerExperts(
        resident=resident,
        host=tuple(one(e, "pinned_host") for e in range(slots, EXPERTS)),
        address=jnp.arange(EXPERTS, dtype=jnp.int32),
    )


def whose(experts):
    """The number that each expert's weights hold."""
    held = []
    for address in np.asarray(experts.address):
        if address >= experts.slots:
            arrays = experts.host[address - experts.slots]
            assert arrays.gate_up.sharding.memory_kind == "pinned_host"
        elif isinstance(experts.resident, ExpertBank):
            arrays = [array[address] for array in experts.resident]
        else:
            arrays = experts.resident[address]
            assert arrays.gate_up.sharding.memory_kind == "device"
        numbers = {float(n) for array in arrays for n in np.ravel(array)}
        assert len(numbers) == 1
        held.append(numbers.pop())
    return held


@pytest.mark.parametrize("bank", [False, True], ids=["separate", "bank"])
@settings(max_examples=20)
@given(slots=st.integers(1, EXPERTS - 1), picks=st.lists(st.integers(0, 99), max_size=8))
def test_no_order_of_swaps_loses_or_doubles_an_expert(bank, slots, picks):
    experts = make_layer(slots, bank)
    resident = set(range(slots))
    for pick in picks:
        outgoing = sorted(resident)[pick % slots]
        missing = sorted(set(range(EXPERTS)) - resident)
        incoming = missing[pick // slots % len(missing)]
        experts = swap_experts(experts, incoming, outgoing)
        resident = resident - {outgoing} | {incoming}
        assert violations(experts) == []
        assert whose(experts) == list(range(EXPERTS))
        assert {e for e, a in enumerate(np.asarray(experts.address)) if a < slots} == resident


@pytest.mark.parametrize(
    "incoming, outgoing, message",
    [
        (1, 0, "expert 1 is resident already, in slot 1"),
        (3, 4, "expert 4 is not resident: it has no slot to give"),
        (9, 0, "there is no expert 9; the layer has 5"),
    ],
)
def test_what_cannot_be_swapped_is_refused(incoming, outgoing, message):
    with pytest.raises(ValueError, match=message):
        swap_experts(make_layer(2, bank=False), incoming, outgoing)


def test_violations_are_found():
    experts = make_layer(2, bank=True)
    doubled = LayerExperts(experts.resident, experts.host, jnp.zeros(EXPERTS, jnp.int32))
    lost = LayerExperts(experts.resident, experts.host[1:], experts.address)
    assert "no permutation" in violations(doubled)[0]
    assert "2 slots and 2 experts in host memory do not make 5" in violations(lost)[0]
    experts.resident.gate_up.delete()
    assert violations(experts) == ["arrays have been donated and not replaced"]


def test_a_bank_is_written_in_place():
    experts = make_layer(2, bank=True)
    before = [array.unsafe_buffer_pointer() for array in experts.resident]
    experts = swap_experts(experts, 3, 0)
    assert [array.unsafe_buffer_pointer() for array in experts.resident] == before


def test_writing_into_a_bank_takes_no_memory():
    """So it cannot fail for want of it, when the bank has been given up."""
    bank = ExpertBank(jnp.zeros((4, 64, 32)), jnp.zeros((4, 32, 32)))
    expert = Expert(*(array[0] for array in bank))
    memory = store_expert.lower(bank, expert, 1).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(array.nbytes for array in bank)
    assert memory.temp_size_in_bytes < 1024


@pytest.fixture(scope="module")
def half(tiny):
    budget = device_memory_for(tiny, experts=0.5, **SIZES)
    return moe_jax.load(tiny, device_memory=budget, **SIZES)


def test_swaps_change_no_result_and_compile_nothing(half, engine):
    expected = engine.logits(TOKENS)
    assert_close(half.logits(TOKENS), expected)
    traces = half.stats.traces
    for layer, incoming, outgoing in ((0, 3, 0), (2, 2, 1), (0, 0, 1)):
        half._loop.runner.swap(layer, incoming, outgoing)
        assert_close(half.logits(TOKENS), expected)
    assert half.stats.traces == traces
    stored, plain = (arrays_by_target(e._loop.runner.model) for e in (half, engine))
    assert stored.keys() == plain.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)


def test_a_dense_layer_has_nothing_to_swap(half):
    with pytest.raises(ValueError, match="layer 1 is dense: it has no experts to swap"):
        half._loop.runner.swap(1, 0, 1)
