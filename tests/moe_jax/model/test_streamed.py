"""Streamed experts give the same result in the form for accelerators as in that for the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_offload.memory import sharding
from moe_jax.model import dispatch as dispatching
from moe_jax.model.dispatch import block_widths, gather_rows
from moe_jax.model.experts import Expert
from moe_jax.model.ops import gated_ffn
from moe_jax.model.streamed import run_streamed
from tests.tolerances import assert_close

EXPERTS, SLOTS, EMBED, FFN = 7, 2, 8, 12
dispatch = jax.jit(dispatching.dispatch, static_argnums=(2, 3))


def apply(expert, rows):
    return gated_ffn(expert.gate_up, expert.down, rows, "silu")


@functools.cache
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    return [(draw(2 * FFN, EMBED), draw(EMBED, FFN)) for _ in range(EXPERTS - SLOTS)]


def in_host_memory(pairs):
    return tuple(Expert(*jax.device_put(pair, sharding("pinned_host"))) for pair in pairs)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_adds_the_results_of_the_chosen_experts_and_leaves_the_rest(backend, tokens, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((tokens, EMBED), np.float32))
    choices = np.stack([rng.permutation(EXPERTS)[:3] for _ in range(tokens)]).astype(np.int32)
    widths = block_widths(tokens, 3, EXPERTS)
    where = dispatch(choices, np.ones(tokens, bool), EXPERTS, widths)
    rows = gather_rows(x, where)
    before = jnp.asarray(rng.standard_normal(rows.shape, np.float32))
    counts, ends = np.asarray(where.counts), np.cumsum(where.used)
    host = in_host_memory(arrays())
    run = jax.jit(functools.partial(run_streamed, apply, host, slots=SLOTS))
    for streamed in [(), (4,), (3, 1), (0, 2, 4), (3, 2, 1, 0), (0, 1, 2, 3, 4)]:
        used = [e for e in streamed if counts[e + SLOTS]]
        chosen = jnp.asarray(used + [0] * (len(host) - len(used)), jnp.int32)
        output = run(
            rows=rows, where=where, chosen=chosen, count=jnp.int32(len(used)), output=before
        )
        expected = np.asarray(before).copy()
        for e in used:
            start = ends[e + SLOTS] - where.used[e + SLOTS]
            own = slice(int(start), int(start + counts[e + SLOTS]))
            expected[own] += apply(Expert(*map(jnp.asarray, arrays()[e])), rows[own])
        assert_close(output, jnp.asarray(expected))


def test_experts_that_are_not_chosen_are_never_read(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    poison = lambda pair: tuple(np.full_like(array, np.nan) for array in pair)
    pairs = [pair if e in (1, 3) else poison(pair) for e, pair in enumerate(arrays())]
    host = in_host_memory(pairs)
    choices = jnp.asarray([[1 + SLOTS, 3 + SLOTS], [3 + SLOTS, 0]], jnp.int32)
    widths = block_widths(2, 2, EXPERTS)
    where = dispatch(choices, np.ones(2, bool), EXPERTS, widths)
    rows = gather_rows(jnp.ones((2, EMBED), jnp.float32), where)
    chosen = jnp.asarray([1, 3, 0, 0, 0], jnp.int32)
    run = jax.jit(functools.partial(run_streamed, apply, host, slots=SLOTS))
    output = run(
        rows=rows,
        where=where,
        chosen=chosen,
        count=jnp.int32(2),
        output=jnp.zeros_like(rows),
    )
    assert not np.isnan(output).any()
