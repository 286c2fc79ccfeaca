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

from host_offload.host_compute import as_host, on_host
from moe_jax.config import Activation
from moe_jax.model.blocks import order_by_width, run_blocks
from moe_jax.model.dispatch import Dispatch
from moe_jax.model.int8 import Int8Expert, gated_ffn_int8
from moe_jax.model.ops import activate, gated_ffn
from moe_jax.model.streamed import run_expert, run_streamed
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
      host: the other experts, separate arrays each, in pinned host memory.
      address: each expert's address.
    """

    resident: Resident
    host: tuple[Expert | Int8Expert, ...]
    address: Int[Array, " experts"]

    @property
    def slots(self) -> int:
        """How many experts are resident."""
        if isinstance(self.resident, ExpertBank):
            return self.resident.gate_up.shape[0]
        return len(self.resident)


def run_experts(
    experts: LayerExperts,
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    mode: Int[Array, " experts"],
    activation: Activation,
    streams: bool = True,
    rounded: bool = False,
) -> Float[Array, "rows embed"]:
    """Computes every row by its expert, in the way `mode` (by address) says; float32.

    `where` is in addresses. Rows that no expert owns are 0. Without `streams` no mode is STREAM,
    and nothing is compiled for it: its memory alone would slow a short step on the CPU backend.
    With `rounded`, products and results have the dtype of the rows (see
    `host_offload.rounded_products`).
    """
    output = run_resident(experts.resident, rows, where, activation, rounded)
    if not experts.host:
        return output
    ffn, slots = functools.partial(_apply, activation, rounded), experts.slots
    missing_mode = mode[slots:]
    hosted = run_on_host(experts.host, rows, where, missing_mode, slots, activation, rounded)
    if streams:
        streamed, count = _selected(missing_mode == Mode.STREAM)
        output = run_streamed(ffn, experts.host, rows, where, streamed, count, slots, output)
    # The barrier keeps the device work out of the addition, where it would wait for the host.
    return lax.optimization_barrier(output) + hosted


def _apply(
    activation: Activation, rounded: bool, expert: Expert | Int8Expert, rows: Array
) -> Array:
    if isinstance(expert, Int8Expert):
        return gated_ffn_int8(expert, rows, activation)
    return gated_ffn(expert.gate_up, expert.down, rows, activation, rounded)


def _selected(chosen: Array) -> tuple[Array, Array]:
    """The indices where `chosen` holds, first ones first, and how many there are."""
    (indices,) = jnp.nonzero(chosen, size=chosen.shape[0], fill_value=0)
    return indices.astype(jnp.int32), chosen.sum(dtype=jnp.int32)


def run_resident(
    resident: Resident,
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    activation: Activation,
    rounded: bool = False,
) -> Float[Array, "rows embed"]:
    """Runs the resident experts, whose rows come first; float32. Other rows are 0.

    With `rounded`, as in `run_experts`.
    """
    if isinstance(resident, ExpertBank):
        return _run_bank(resident, rows, where, activation)
    # Not bfloat16 where products are in float32: XLA:CPU of jax 0.10 would rewrite the whole array
    # to change one block.
    output = jnp.zeros(rows.shape, rows.dtype if rounded else jnp.float32)
    if not resident:
        return output
    ffn = functools.partial(_apply, activation, rounded)
    order = order_by_width(where, where.block_expert < len(resident))
    return run_blocks(ffn, resident, rows, where, 0, order, output)


def run_arrived(
    expert: Expert | Int8Expert,
    address: Int[Array, ""],
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    output: Float[Array, "rows embed"],
    activation: Activation,
) -> Float[Array, "rows embed"]:
    """Adds the results of one expert whose weights have been brought over for this call."""
    ffn = functools.partial(_apply, activation, False)
    return run_expert(ffn, expert, address, rows, where, output)


def _run_bank(bank, rows, where, activation):
    """Runs the resident experts, whose rows come first, as grouped products over the bank."""
    slots = bank.gate_up.shape[0]
    used = where.used[:slots]
    if activation == "silu":
        hidden = grouped_matmul(rows, bank.gate_up, used, gated=True)
    else:
        gate, up = jnp.split(grouped_matmul(rows, bank.gate_up, used), 2, axis=1)
        hidden = activate(activation)(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    down = grouped_matmul(hidden.astype(rows.dtype), bank.down, used)
    return down.astype(jnp.float32)


def run_on_host(
    host: tuple[Expert | Int8Expert, ...],
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    mode: Int[Array, " missing"],
    slots: int,
    activation: Activation,
    rounded: bool = False,
) -> Float[Array, "rows embed"]:
    """Runs the experts in mode HOST, all in one host computation; float32.

    `where` is in addresses; `host` and `mode` begin at address `slots`. Other rows are 0. With
    `rounded`, as in `run_experts`.
    """
    ffn = functools.partial(_apply, activation, rounded)
    block_mode = mode.at[where.block_expert - slots].get(
        mode="fill", fill_value=Mode.IDLE, wrap_negative_indices=False
    )
    order = order_by_width(where, block_mode == Mode.HOST)

    def body(host, rows, where, order):
        rows = as_host(rows)
        # Not zeros: an array made from nothing would be device-typed.
        output = rows.astype(rows.dtype if rounded else jnp.float32) * 0
        return run_blocks(ffn, host, rows, where, slots, order, output)

    return on_host(body, host, rows, where, order)
