"""Experts that are brought over from host memory for one call, one while another computes."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from host_offload.host_compute import as_device
from moe_jax.model.blocks import Ffn, order_by_width, run_blocks
from moe_jax.model.dispatch import Dispatch


def run_streamed(
    ffn: Ffn,
    host: Sequence[Any],
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    chosen: Int[Array, " missing"],
    count: Int[Array, ""],
    slots: int,
    output: Float[Array, "rows embed"],
) -> Float[Array, "rows embed"]:
    """Adds the results of the experts chosen[:count] of `host`, which begins at address `slots`."""
    # The CPU backend does one thing after another; there, blocks are as wide as they need to be.
    form = _one_by_one if jax.default_backend() == "cpu" else _fetch_beside_compute
    run = functools.partial(form, ffn, host, rows, where, chosen, count, slots)
    return lax.cond(count > 0, run, lambda output: output, output)


def _one_by_one(ffn, host, rows, where, chosen, count, slots, output):
    """Fetches an expert, runs its blocks, and goes on to the next."""
    fetches = [functools.partial(as_device, expert) for expert in host]

    def run_next(i, output):
        expert = lax.switch(chosen[i], fetches)
        return _run_in_blocks(ffn, expert, chosen[i] + slots, rows, where, output)

    return lax.fori_loop(0, count, run_next, output)


def _fetch_beside_compute(ffn, host, rows, where, chosen, count, slots, output):
    """Fetches every expert but the first while the one before it computes.

    What a branch of a switch starts, it waits for: a fetch runs beside what stands in the same
    branch and nothing else. So each branch fetches its expert and computes the one at hand, whose
    tokens are taken in one piece, as wide as any expert could need: the blocks' loop and switch
    would be compiled once per branch.
    """
    # After the last expert nothing is fetched.
    after = jnp.where(jnp.arange(1, len(host) + 1) < count, jnp.roll(chosen, -1), len(host))

    take = lambda i: _take_piece(rows, where, chosen[i] + slots)
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
    rows: Float[Array, "rows embed"],
    where: Dispatch,
    output: Float[Array, "rows embed"],
) -> Float[Array, "rows embed"]:
    """Adds the results of one expert, whose weights are here; in the form that streaming has."""
    if jax.default_backend() == "cpu":
        return _run_in_blocks(ffn, expert, address, rows, where, output)
    y = ffn(expert, _take_piece(rows, where, address))
    return _add_piece(y, where, address, output)


def _run_in_blocks(ffn, expert, address, rows, where, output):
    order = order_by_width(where, where.block_expert == address)
    return run_blocks(ffn, (expert,), rows, where, address, order, output)


def _place(rows, where, address):
    """Where an expert's rows begin, where a piece that holds them does, and its width."""
    width = min(where.position.shape[0], rows.shape[0])
    start = where.block_start[where.first_block[address]]
    return start, jnp.minimum(start, rows.shape[0] - width), width


def _take_piece(rows, where, address):
    _, piece, width = _place(rows, where, address)
    return lax.dynamic_slice_in_dim(rows, piece, width)


def _add_piece(y, where, address, output):
    start, piece, width = _place(output, where, address)
    row = piece + jnp.arange(width, dtype=jnp.int32)
    own = (start <= row) & (row < start + where.counts[address])
    y = jnp.where(own[:, None], y, 0) + lax.dynamic_slice_in_dim(output, piece, width)
    return lax.dynamic_update_slice_in_dim(output, y, piece, 0)
