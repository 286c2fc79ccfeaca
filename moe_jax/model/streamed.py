"""Experts that are brought over from host memory for one call, one while another computes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from host_offload.host_compute import as_device
from moe_jax.model.blocks import Ffn, run_blocks
from moe_jax.model.dispatch import Dispatch


def run_streamed(
    ffn: Ffn,
    host: Sequence[Any],
    columns: Float[Array, "embed columns"],
    where: Dispatch,
    chosen: Int[Array, " missing"],
    count: Int[Array, ""],
    slots: int,
    output: Float[Array, "embed columns"],
) -> Float[Array, "embed columns"]:
    """Adds the results of the experts chosen[:count] of `host`, which begins at address `slots`."""
    fetches = [functools.partial(as_device, expert) for expert in host]
    in_order = jnp.arange(where.block_expert.shape[0], dtype=jnp.int32)

    def run_expert(i, carry):
        expert, output = carry
        # After the last expert nothing is fetched.
        following_index = jnp.where(i + 1 < count, jnp.roll(chosen, -1)[i], len(host))
        following = lax.switch(following_index, [*fetches, lambda: expert])
        address = chosen[i] + slots
        first = where.first_block[address]
        used = (where.counts[address] + where.widths[-1] - 1) // where.widths[-1]
        output = run_blocks(
            ffn, (expert,), columns, where, address, in_order, first, first + used, output
        )
        return following, output

    def run_all(output):
        first_expert = lax.switch(chosen[0], fetches)
        return lax.fori_loop(0, count, run_expert, (first_expert, output))[1]

    return lax.cond(count > 0, run_all, lambda output: output, output)
