"""Experts that are brought over from host memory for one call, one while another computes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
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
    # The CPU backend does one thing after another; there, blocks are as wide as they need to be.
    form = _one_by_one if jax.default_backend() == "cpu" else _fetch_beside_compute
    run = functools.partial(form, ffn, host, columns, where, chosen, count, slots)
    return lax.cond(count > 0, run, lambda output: output, output)


def _one_by_one(ffn, host, columns, where, chosen, count, slots, output):
    """Fetches an expert, runs its blocks, and goes on to the next."""
    fetches = [functools.partial(as_device, expert) for expert in host]

    def run_next(i, output):
        expert = lax.switch(chosen[i], fetches)
        return _run_in_blocks(ffn, expert, chosen[i] + slots, columns, where, output)

    return lax.fori_loop(0, count, run_next, output)


def _fetch_beside_compute(ffn, host, columns, where, chosen, count, slots, output):
    """Fetches every expert but the first while the one before it computes.

    What a branch of a switch starts, it waits for: a fetch runs beside what stands in the same
    branch and nothing else. So each branch fetches its expert and computes the one at hand, whose
    tokens are taken in one piece, as wide as any expert could need: the blocks' loop and switch
    would be compiled once per branch.
    """
    # After the last expert nothing is fetched.
    after = jnp.where(jnp.arange(1, len(host) + 1) < count, jnp.roll(chosen, -1), len(host))

    take = lambda i: _take_piece(columns, where, chosen[i] + slots)
    put = lambda i, y, output: _add_piece(y, where, chosen[i] + slots, output)

    def fetch(following, expert, x):
        return as_device(following), ffn(expert, x)

    def fetch_nothing(expert, x):
        return expert, jnp.zeros(x.shape, jnp.float32)

    fetches = [functools.partial(fetch, following) for following in host]

    def two_turns(pair, carry):
        # Two experts take turns in two places. With one turn, each expert fetched would be copied
        # once more, to where the loop began with one.
        i, (expert, output) = 2 * pair, carry
        expert, y = lax.switch(after[i], fetches, expert, take(i))
        output = put(i, y, output)
        expert, y = lax.switch(after[i + 1], [*fetches, fetch_nothing], expert, take(i + 1))
        return expert, put(i + 1, y, output)

    first = lax.switch(chosen[0], [functools.partial(as_device, expert) for expert in host])
    last, output = lax.fori_loop(0, count // 2, two_turns, (first, output))
    return put(count - 1, ffn(last, take(count - 1)), output)


def run_expert(
    ffn: Ffn,
    expert: Any,
    address: Int[Array, ""],
    columns: Float[Array, "embed columns"],
    where: Dispatch,
    output: Float[Array, "embed columns"],
) -> Float[Array, "embed columns"]:
    """Adds the results of one expert, whose weights are here; in the form that streaming has."""
    if jax.default_backend() == "cpu":
        return _run_in_blocks(ffn, expert, address, columns, where, output)
    y = ffn(expert, _take_piece(columns, where, address))
    return _add_piece(y, where, address, output)


def _run_in_blocks(ffn, expert, address, columns, where, output):
    in_order = jnp.arange(where.block_expert.shape[0], dtype=jnp.int32)
    first = where.first_block[address]
    end = first + (where.counts[address] + where.widths[-1] - 1) // where.widths[-1]
    return run_blocks(ffn, (expert,), columns, where, address, in_order, first, end, output)


def _place(columns, where, address):
    """Where an expert's columns begin, where a piece that holds them does, and its width."""
    width = min(where.position.shape[0], columns.shape[1])
    start = where.block_start[where.first_block[address]]
    return start, jnp.minimum(start, columns.shape[1] - width), width


def _take_piece(columns, where, address):
    _, piece, width = _place(columns, where, address)
    return lax.dynamic_slice_in_dim(columns, piece, width, 1)


def _add_piece(y, where, address, output):
    start, piece, width = _place(output, where, address)
    column = piece + jnp.arange(width, dtype=jnp.int32)
    own = (start <= column) & (column < start + where.counts[address])
    y = jnp.where(own, y, 0) + lax.dynamic_slice_in_dim(output, piece, width, 1)
    return lax.dynamic_update_slice_in_dim(output, y, piece, 1)
