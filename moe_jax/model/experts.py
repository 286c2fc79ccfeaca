"""The routed experts of one layer, each computed where the plan says.

Experts are addressed so that those resident on the device come first: address a < slots is slot a
of the device, any other is entry a - slots of the layer's list in host memory.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from host_offload.host_compute import as_device, as_host, on_host
from moe_jax.config import Activation
from moe_jax.model.dispatch import Dispatch
from moe_jax.model.ops import activate, gated_ffn
from moe_jax.placement.planner import Mode
from pallas_kernels.grouped_matmul import grouped_matmul


class Expert(NamedTuple):
    """One expert's weights: gate_up [2 ffn, embed] and down [embed, ffn]."""

    gate_up: Float[Array, "two_ffn embed"]
    down: Float[Array, "embed ffn"]


class ExpertBank(NamedTuple):
    """The resident experts of a layer in two arrays, for devices that index them for free."""

    gate_up: Float[Array, "slots two_ffn embed"]
    down: Float[Array, "slots embed ffn"]


Resident = tuple[Expert, ...] | ExpertBank


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerExperts:
    """Where the experts of one layer are.

    Attributes:
      resident: the experts in device memory: separate arrays on the CPU backend, else a bank.
      host: the other experts, one array pair each, in pinned host memory.
      address: each expert's address.
    """

    resident: Resident
    host: tuple[Expert, ...]
    address: Int[Array, " experts"]

    @property
    def slots(self) -> int:
        """How many experts are resident."""
        if isinstance(self.resident, ExpertBank):
            return self.resident.gate_up.shape[0]
        return len(self.resident)


def run_experts(
    experts: LayerExperts,
    blocks: Float[Array, "blocks embed rows"],
    where: Dispatch,
    mode: Int[Array, " experts"],
    activation: Activation,
) -> Float[Array, "blocks embed rows"]:
    """Computes every block by its expert, in the way `mode` (by address) says; float32.

    `where` is in addresses. Blocks that no expert owns are 0.
    """
    ffn = functools.partial(_apply, activation)
    # Not bfloat16: XLA:CPU of jax 0.10 rewrites a whole bfloat16 array to change one block.
    output = jnp.zeros(blocks.shape, jnp.float32)
    slots = experts.slots
    if isinstance(experts.resident, ExpertBank):
        output = _run_bank(experts.resident, blocks, where, activation)
    elif slots:
        output = _run_resident(experts.resident, blocks, where, ffn, output)
    if not experts.host:
        return output
    missing_mode = mode[slots:]
    hosted = run_on_host(experts.host, blocks, where, missing_mode, slots, activation)
    output = _run_streamed(experts.host, blocks, where, missing_mode, slots, ffn, output)
    # The barrier keeps the device work out of the addition, where it would wait for the host.
    return lax.optimization_barrier(output) + hosted


def _apply(activation: Activation, expert: Expert, x: Array) -> Array:
    return gated_ffn(expert.gate_up, expert.down, x, activation)


def _selected(chosen: Array) -> tuple[Array, Array]:
    """The indices where `chosen` holds, first ones first, and how many there are."""
    (indices,) = jnp.nonzero(chosen, size=chosen.shape[0], fill_value=0)
    return indices.astype(jnp.int32), chosen.sum(dtype=jnp.int32)


def _run_resident(resident, blocks, where, ffn, output):
    """Runs the blocks of resident experts, whose blocks come first."""
    branches = [functools.partial(ffn, expert) for expert in resident]
    count = (where.block_expert < len(resident)).sum(dtype=jnp.int32)

    def run(block, output):
        y = lax.switch(where.block_expert[block], branches, blocks[block])
        return lax.dynamic_update_index_in_dim(output, y, block, 0)

    return lax.fori_loop(0, count, run, output)


def _run_bank(bank, blocks, where, activation):
    """Runs the blocks of resident experts as grouped products over the bank."""
    slots = bank.gate_up.shape[0]
    count, embed, rows = blocks.shape
    used = (where.counts[:slots] + rows - 1) // rows * rows
    flat = blocks.swapaxes(1, 2).reshape(-1, embed)
    if activation == "silu":
        hidden = grouped_matmul(flat, bank.gate_up, used, gated=True)
    else:
        gate, up = jnp.split(grouped_matmul(flat, bank.gate_up, used), 2, axis=1)
        hidden = activate(activation)(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    down = grouped_matmul(hidden.astype(flat.dtype), bank.down, used)
    return down.reshape(count, rows, embed).swapaxes(1, 2).astype(jnp.float32)


def run_on_host(
    host: tuple[Expert, ...],
    blocks: Float[Array, "blocks embed rows"],
    where: Dispatch,
    mode: Int[Array, " missing"],
    slots: int,
    activation: Activation,
) -> Float[Array, "blocks embed rows"]:
    """Runs the blocks of the experts in mode HOST, all in one host computation; float32.

    `where` is in addresses; `host` and `mode` begin at address `slots`. Other blocks are 0.
    """
    ffn = functools.partial(_apply, activation)
    block_mode = mode.at[where.block_expert - slots].get(
        mode="fill", fill_value=Mode.IDLE, wrap_negative_indices=False
    )
    chosen, count = _selected(block_mode == Mode.HOST)

    def body(host, blocks, chosen, count, block_expert):
        blocks = as_host(blocks)
        branches = [functools.partial(ffn, expert) for expert in host]

        def run(i, output):
            block = chosen[i]
            x = lax.dynamic_index_in_dim(blocks, block, keepdims=False)
            y = lax.switch(block_expert[block] - slots, branches, x)
            return lax.dynamic_update_index_in_dim(output, y, block, 0)

        # Not zeros: an array made from nothing would be device-typed.
        return lax.fori_loop(0, count, run, blocks.astype(jnp.float32) * 0)

    return on_host(body, host, blocks, chosen, count, where.block_expert)


def _run_streamed(host, blocks, where, mode, slots, ffn, output):
    """Brings the experts in mode STREAM over, fetching one while the one before computes."""
    rows = blocks.shape[2]
    chosen, count = _selected(mode == Mode.STREAM)
    fetches = [functools.partial(as_device, expert) for expert in host]

    def run_expert(i, carry):
        expert, output = carry
        # After the last expert nothing is fetched.
        following_index = jnp.where(i + 1 < count, jnp.roll(chosen, -1)[i], len(host))
        following = lax.switch(following_index, [*fetches, lambda: expert])
        address = chosen[i] + slots
        first = where.first_block[address]
        used = (where.counts[address] + rows - 1) // rows

        def run_block(block, output):
            y = ffn(expert, blocks[block])
            return lax.dynamic_update_index_in_dim(output, y, block, 0)

        return following, lax.fori_loop(first, first + used, run_block, output)

    def run_all(output):
        first_expert = lax.switch(chosen[0], fetches)
        return lax.fori_loop(0, count, run_expert, (first_expert, output))[1]

    return lax.cond(count > 0, run_all, lambda output: output, output)
