"""Tokens into expert order and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.model import dispatch as dispatching
from moe_jax.model.dispatch import block_widths, num_blocks, num_rows

# One program each: operation by operation they would take a second to compile.
dispatch = jax.jit(dispatching.dispatch, static_argnums=(2, 3))
gather_rows, combine = jax.jit(dispatching.gather_rows), jax.jit(dispatching.combine)


def draw_choices(seed, tokens, choices, experts):
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:choices] for _ in range(tokens)]).astype(np.int32)


def blocks_of(where):
    """(expert, first row, width) of every used block."""
    widths = np.asarray(where.widths)[np.asarray(where.block_width)].tolist()
    blocks = zip(where.block_expert.tolist(), where.block_start.tolist(), widths, strict=True)
    return [block for block in blocks if block[0] < where.counts.size]


@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 7, 150]),
    shape=st.sampled_from([(1, 1), (2, 4), (8, 64)]),
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
    where = dispatch(
        jnp.asarray(chosen), jnp.asarray(valid), experts, block_widths(tokens, choices, experts)
    )
    rows = gather_rows(jnp.asarray(x), where)
    scale = np.zeros(rows.shape[0], np.float32)
    for expert, start, width in blocks_of(where):
        scale[start : start + width] = expert + 1
    y = combine(rows * jnp.asarray(scale)[:, None], jnp.asarray(gates), where)
    expected = np.where(valid[:, None], np.sum(gates * (chosen + 1), axis=1)[:, None] * x, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        where.counts, np.bincount(chosen[valid].reshape(-1), minlength=experts)
    )


def test_an_expert_has_full_blocks_and_one_that_holds_the_rest():
    chosen = jnp.asarray(np.repeat([[3], [0], [5]], [300, 40, 172], axis=0), jnp.int32)
    where = dispatch(chosen, jnp.ones(512, bool), 8, tuple(range(16, 129, 16)))
    assert where.widths == (16, 32, 48, 64, 80, 96, 112, 128)
    assert where.counts.tolist() == [40, 0, 0, 300, 0, 172, 0, 0]
    assert where.used.tolist() == [48, 0, 0, 128 + 128 + 48, 0, 128 + 48, 0, 0]
    shares = [(0, 0, 48), (3, 48, 128), (3, 176, 128), (3, 304, 48), (5, 352, 128), (5, 480, 48)]
    assert list(blocks_of(where)) == shares
    assert where.first_block.tolist() == [0, 1, 1, 1, 4, 4, 6, 6]
    source = where.source.tolist()
    assert source[:48] == [*range(300, 340)] + [512] * 8  # token order, then empty rows
    assert source[48:348] == [*range(300)]


@pytest.mark.parametrize("rounded, step", [(False, 32), (True, 16)])
def test_rounded_products_have_finer_blocks(rounded, step):
    assert block_widths(512, 2, 8, rounded) == tuple(range(step, 257, step))


@pytest.mark.parametrize("experts", [1, 4, 8, 16, 64, 128, 512])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16, 32, 128, 512])
@pytest.mark.parametrize("choices", [1, 8])
@pytest.mark.parametrize("rounded", [False, True])
def test_there_is_room_for_any_routing(tokens, choices, experts, rounded):
    choices = min(choices, experts)
    widths = block_widths(tokens, choices, experts, rounded)
    assert list(widths) == sorted(set(widths)) and widths[-1] <= tokens
    gap = np.diff([0, *widths]).max()
    # Every expert but one gets what leaves most of its last block unused, and one gets the rest.
    worst_width = widths[int(np.diff([0, *widths]).argmax())]
    for wasteful in (1, worst_width - gap + 1):
        pairs, used, blocks, taken = tokens * choices, 0, 0, 0
        for _ in range(experts):
            count = min(wasteful, pairs - taken, tokens)
            taken += count
            full, rest = divmod(count, widths[-1])
            last = next(width for width in (0, *widths) if width >= rest)
            used, blocks = used + full * widths[-1] + last, blocks + full + (rest > 0)
        rest = pairs - taken
        used, blocks = used + rest, blocks + rest // widths[-1]
        assert blocks <= num_blocks(tokens, choices, experts, widths)
        assert used <= num_rows(tokens, choices, experts, widths)
