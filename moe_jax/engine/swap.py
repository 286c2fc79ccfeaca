"""Exchanges a resident expert of a layer with one in host memory.

Knows arrays and addresses; which experts are worth it is decided elsewhere.
"""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from host_offload.memory import sharding, to_device, to_host
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from moe_jax.model.int8 import Int8Expert


def swap_experts(experts: LayerExperts, incoming: int, outgoing: int) -> LayerExperts:
    """DONATES a bank of resident experts. The layer after two experts have changed places.

    Both experts are at their new places, and the new addresses too, before the bank is given up:
    what raises before then leaves the layer as it was. Hold interrupts from here until the result
    is stored.

    Args:
      experts: the layer.
      incoming: the expert that becomes resident.
      outgoing: the resident expert whose slot it gets.

    Raises:
      ValueError: one of them is not where it must be, or there is no such expert.
      RuntimeError: of JAX, if memory runs out on either side.
    """
    address = np.asarray(experts.address).copy()
    for expert in (incoming, outgoing):
        if not 0 <= expert < address.size:
            raise ValueError(f"there is no expert {expert}; the layer has {address.size}")
    slot, entry = int(address[outgoing]), int(address[incoming]) - experts.slots
    if entry < 0:
        raise ValueError(f"expert {incoming} is resident already, in slot {address[incoming]}")
    if slot >= experts.slots:
        raise ValueError(f"expert {outgoing} is not resident: it has no slot to give")
    if isinstance(experts.host[entry], Int8Expert):
        raise ValueError(f"expert {incoming} was rounded to int8: it cannot become resident")
    address[[incoming, outgoing]] = address[[outgoing, incoming]]

    host = list(experts.host)
    (home,) = host[entry].gate_up.devices()  # of whose host memory: the device's or the CPU's
    arriving = Expert(*to_device(tuple(host[entry])))
    host[entry] = Expert(*to_host(tuple(_resident(experts, slot)), home))
    new_address = jax.device_put(address, sharding("device"))
    jax.block_until_ready((arriving, host[entry], new_address))
    if isinstance(experts.resident, ExpertBank):
        resident = store_expert(experts.resident, arriving, slot)
    else:
        resident = (*experts.resident[:slot], arriving, *experts.resident[slot + 1 :])
    return LayerExperts(resident=resident, host=tuple(host), address=new_address)


@functools.partial(jax.jit, donate_argnums=0)
def store_in_bank(
    bank: Float[Array, "slots out in"], array: Float[Array, "out in"], slot: int | Int[Array, ""]
) -> Float[Array, "slots out in"]:
    """DONATES bank. Writes one expert into its slot."""
    return bank.at[slot].set(array)


@functools.partial(jax.jit, donate_argnums=0)
def store_expert(bank: ExpertBank, expert: Expert, slot: int | Int[Array, ""]) -> ExpertBank:
    """DONATES bank. Writes an expert into its slot.

    One call, and in place: it is refused as a whole, while the bank is still there, or it needs no
    memory that it could lack.
    """
    parts = zip(bank, expert, strict=True)
    return ExpertBank(*(held.at[slot].set(array) for held, array in parts))


def violations(experts: LayerExperts) -> list[str]:
    """What is wrong with a layer's experts: none may be lost, doubled or deleted."""
    address = np.asarray(experts.address)
    found = []
    if sorted(address.tolist()) != list(range(address.size)):
        found.append(f"addresses {address.tolist()} are no permutation")
    if experts.slots + len(experts.host) != address.size:
        found.append(
            f"{experts.slots} slots and {len(experts.host)} experts in host memory do not make "
            f"{address.size}"
        )
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(experts)):
        found.append("arrays have been donated and not replaced")
    return found


def _resident(experts: LayerExperts, slot: int) -> Expert:
    if isinstance(experts.resident, ExpertBank):
        return Expert(*_take(experts.resident, slot))
    return experts.resident[slot]


@jax.jit
def _take(bank: ExpertBank, slot: Int[Array, ""]) -> tuple[Array, ...]:
    return tuple(array[slot] for array in bank)
