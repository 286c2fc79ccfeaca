"""Experts give the same result wherever they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from host_offload.memory import sharding
from moe_jax.model.dispatch import block_widths, dispatch, gather_rows
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts, run_experts
from moe_jax.model.ops import gated_ffn
from moe_jax.placement.planner import Mode
from tests.tolerances import assert_close

EXPERTS, EMBED, FFN = 6, 8, 12


def make_experts(slots, bank, dtype="float32"):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32).astype(dtype)
    put = lambda kind: lambda pair: Expert(*(jax.device_put(a, sharding(kind)) for a in pair))
    pairs = [(draw(2 * FFN, EMBED), draw(EMBED, FFN)) for _ in range(EXPERTS)]
    resident = tuple(map(put("device"), pairs[:slots]))
    if bank:
        resident = ExpertBank(*(jnp.stack(arrays) for arrays in zip(*resident, strict=True)))
    host = tuple(map(put("pinned_host"), pairs[slots:]))
    return LayerExperts(resident, host, jnp.arange(EXPERTS, dtype=jnp.int32)), pairs


def run(experts, x, chosen, mode):
    widths = block_widths(*chosen.shape, EXPERTS)
    where = dispatch(chosen, jnp.ones(x.shape[0], bool), EXPERTS, widths)
    rows = gather_rows(x, where)
    return run_experts(experts, rows, where, mode, "silu"), where


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("slots, bank", [(6, False), (6, True), (3, False), (3, True), (0, False)])
@pytest.mark.parametrize("missing", [(Mode.STREAM,), (Mode.HOST,), (Mode.STREAM, Mode.HOST)])
def test_every_placement_equals_the_plain_expert(tokens, slots, bank, missing):
    experts, pairs = make_experts(slots, bank)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((tokens, EMBED), np.float32))
    chosen = jnp.asarray(
        np.stack([rng.permutation(EXPERTS)[:2] for _ in range(tokens)]).astype(np.int32)
    )
    counts = np.bincount(np.asarray(chosen).reshape(-1), minlength=EXPERTS)
    mode = [
        Mode.IDLE if not n else Mode.RESIDENT if e < slots else missing[e % len(missing)]
        for e, n in enumerate(counts)
    ]
    output, where = jax.jit(run)(experts, x, chosen, jnp.asarray(mode, jnp.int32))
    apply = functools.partial(gated_ffn, activation="silu")
    rows = np.asarray(output)
    for choice in range(2):
        got = rows[np.asarray(where.position[:, choice])]
        expected = jnp.concatenate(
            [
                apply(*map(jnp.asarray, pairs[int(chosen[t, choice])]), x[t : t + 1])
                for t in range(tokens)
            ]
        )
        assert_close(jnp.asarray(got), expected)


def test_experts_nobody_chose_are_never_read():
    experts, _ = make_experts(2, bank=False)
    poison = lambda pair: Expert(*(a * jnp.nan for a in pair))
    host_poison = lambda pair: Expert(
        *(jax.device_put(np.full(a.shape, np.nan, np.float32), a.sharding) for a in pair)
    )
    poisoned = LayerExperts(
        (experts.resident[0], poison(experts.resident[1])),
        (experts.host[0], *map(host_poison, experts.host[1:])),
        experts.address,
    )
    x = jnp.ones((2, EMBED), jnp.float32)
    chosen = jnp.asarray([[0, 2], [2, 0]], jnp.int32)
    mode = jnp.asarray([Mode.RESIDENT, 0, Mode.HOST, 0, 0, 0], jnp.int32)
    for way in (Mode.HOST, Mode.STREAM):
        output, _ = jax.jit(run)(poisoned, x, chosen, mode.at[2].set(int(way)))
        assert not np.isnan(output).any()
