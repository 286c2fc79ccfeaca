"""Pages: who gets them, and what is written into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache.paged_kv import (
    PAGE_SIZE,
    LayerKv,
    assign_pages,
    pages_for,
    storage_heads,
    write_kv,
)


def test_sequences_get_pages_of_their_own():
    table = assign_pages([1, PAGE_SIZE, PAGE_SIZE + 1], pages=6)
    used = [row[row < 6].tolist() for row in table]
    assert used == [[0], [1], [2, 3]]
    assert pages_for(0) == 0


def test_too_few_pages_are_refused():
    with pytest.raises(ValueError, match=r"need 3 KV pages of 16 tokens, the cache has 2"):
        assign_pages([PAGE_SIZE + 1, 1], pages=2)


def test_padding_is_written_nowhere():
    pages = jnp.zeros((3, PAGE_SIZE, 1, 2), jnp.float32)
    rows = jnp.asarray([[[1.0, 2.0]], [[np.nan, np.nan]]], jnp.float32)
    slot = jnp.asarray([PAGE_SIZE + 2, 3 * PAGE_SIZE], jnp.int32)
    kv = write_kv(LayerKv(pages, pages), slot, rows, rows)
    assert kv.keys[1, 2, 0].tolist() == [1.0, 2.0]
    assert float(jnp.sum(kv.keys)) == 3.0
    np.testing.assert_array_equal(kv.keys, kv.values)


@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_writing_does_not_copy_the_pages(tokens):
    shape = (5, PAGE_SIZE, 2, 8)

    def step(kv, slot, rows, table):
        kv = write_kv(kv, slot, rows, rows)
        attend = lambda i, total: total + kv.keys[table[i]].astype(jnp.float32).sum()
        return jax.lax.fori_loop(0, table.shape[0], attend, jnp.float32(0)), kv

    pages = jnp.zeros(shape, jnp.uint16)
    rows = jnp.ones((tokens, 2, 8), jnp.bfloat16)
    arguments = LayerKv(pages, pages), jnp.zeros(tokens, jnp.int32), rows, jnp.zeros(2, jnp.int32)
    compiled = jax.jit(step, donate_argnums=0).lower(*arguments).compile().as_text()
    forms = f"{shape[0]},{PAGE_SIZE},2,8", f"{shape[0] * PAGE_SIZE},2,8"
    copied = [
        line.strip()
        for line in compiled.splitlines()
        if " copy(" in line and any(f"u16[{form}]" in line for form in forms)
    ]
    assert not copied


@pytest.mark.parametrize(
    "backend, kv_heads, head_dim, heads",
    [("cpu", 8, 64, (8, 64)), ("tpu", 8, 64, (4, 128)), ("tpu", 1, 64, (1, 64)),
     ("tpu", 4, 128, (4, 128)), ("tpu", 16, 192, (8, 384))],
)  # fmt: skip
def test_heads_fill_the_lanes_of_a_tpu_and_are_told_apart_again(
    backend, kv_heads, head_dim, heads, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert storage_heads(kv_heads, head_dim) == heads
    pages = jnp.zeros((2, PAGE_SIZE, *heads))
    rows = jnp.arange(3.0 * kv_heads * head_dim).reshape(3, kv_heads, head_dim)
    kv = write_kv(LayerKv(pages, pages), jnp.arange(3) + PAGE_SIZE, rows, -rows)
    keys, values = kv.by_head(head_dim)
    np.testing.assert_array_equal(keys[1, :3], rows)
    np.testing.assert_array_equal(values[1, :3], -rows)
