"""Tokens into expert order and back."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.model.dispatch import combine, dispatch, gather_blocks, num_blocks, rows_per_block


def draw_choices(seed, tokens, choices, experts):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype(np.int32)


@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 2, 7, 40, 150]),
    shape=st.sampled_from([(1, 1), (1, 8), (2, 4), (4, 4), (8, 64)]),
    padding=st.sampled_from([0, 1, 3]),
)
def test_every_pair_is_weighted_by_its_expert(seed, tokens, shape, padding):
    choices, experts = shape
    rng = np.random.default_rng(seed)
    chosen = draw_choices(seed, tokens, choices, experts)
    valid = np.arange(tokens) < max(0, tokens - padding)
    gates = rng.random((tokens, choices), np.float32)
    x = rng.standard_normal((tokens, 3), np.float32)
    x[~valid] = np.nan
    where = dispatch(jnp.asarray(chosen), jnp.asarray(valid), experts)
    blocks = gather_blocks(jnp.asarray(x), where)
    scale = (where.block_expert + 1).astype(jnp.float32)[:, None, None]
    y = combine(blocks * scale, jnp.asarray(gates), where)
    expected = np.where(valid[:, None], np.sum(gates * (chosen + 1), axis=1)[:, None] * x, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        where.counts, np.bincount(chosen[valid].reshape(-1), minlength=experts)
    )


def test_blocks_belong_to_one_expert_in_token_order():
    chosen = jnp.asarray([[2], [0], [2], [0], [2]], jnp.int32)
    where = dispatch(chosen, jnp.ones(5, bool), 3)
    rows = where.source.shape[1]
    assert where.counts.tolist() == [2, 0, 3]
    first = where.source.reshape(-1)
    assert first[:2].tolist() == [1, 3]
    start = int(where.first_block[2]) * rows
    assert first[start : start + 3].tolist() == [0, 2, 4]


@pytest.mark.parametrize("experts", [8, 64, 128, 512])
@pytest.mark.parametrize("tokens", [1, 2, 16, 512])
def test_block_bound_covers_the_worst_routing(tokens, experts):
    choices = 8
    rows = rows_per_block(tokens, choices, experts)
    # One token more than a full block for as many experts as possible wastes the most.
    pairs, worst = tokens * choices, 0
    for used in range(1, min(experts, pairs) + 1):
        counts = np.full(used, 1)
        spare = pairs - used
        counts[0] += min(spare, tokens - 1)
        worst = max(worst, int(sum(-(-count // rows) for count in counts)))
    assert worst <= num_blocks(tokens, choices, experts, rows)
