"""Pages: how many there must be, and what is written into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache import paged_kv
from moe_jax.cache.paged_kv import (
    PAGE_SIZE,
    LayerKv,
    PageCopies,
    copy_pages,
    pages_for,
    storage_heads,
    write_kv,
)


@pytest.mark.parametrize("tokens, pages", [(0, 0), (1, 1), (PAGE_SIZE, 1), (PAGE_SIZE + 1, 2)])
def test_pages_for_tokens(tokens, pages):
    assert pages_for(tokens) == pages


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


def numbered_kv(pages, dtype, layers=2):
    """Pages filled with NaN, but for row 1 of each, which holds numbers of its own."""
    shape = (pages, PAGE_SIZE, 2, 8)

    def array(layer):
        values = np.full(shape, np.nan, np.float32)
        values[:, 1] = np.arange(pages).reshape(-1, 1, 1) + 100 * layer
        return jnp.asarray(values).astype(dtype)

    return [LayerKv(array(2 * i), array(2 * i + 1)) for i in range(layers)]


def copies_of(source, target):
    return PageCopies(np.array(source, np.int32), np.array(target, np.int32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "pairs", [[(0, 3)], [(0, 3), (0, 4), (2, 1)], [(n, 12 + n) for n in range(12)]]
)
def test_pages_are_copied_in_all_layers_and_others_stay(dtype, pairs):
    pages = 24
    entries = [(pages, pages), *pairs, (pages, pages)]
    kv = numbered_kv(pages, dtype)
    expected = jax.tree.map(lambda leaf: np.array(leaf, np.float32), kv)
    for leaf in jax.tree.leaves(expected):
        leaf[[target for _, target in pairs]] = leaf[[source for source, _ in pairs]]
    copied = copy_pages(kv, copies_of(*zip(*entries, strict=True)))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kv))
    assert {leaf.dtype for leaf in jax.tree.leaves(copied)} == {jnp.dtype(dtype)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), copied, expected)


def test_without_copies_no_program_runs():
    kv = numbered_kv(3, jnp.float32)
    assert copy_pages(kv, copies_of([3, 3], [3, 3])) is kv


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_copying_a_page_does_not_copy_the_others(dtype):
    zeros = lambda: jnp.zeros((5, PAGE_SIZE, 2, 8), dtype)
    kv = [LayerKv(zeros(), zeros())]
    none = np.full(paged_kv._COPIES_AT_ONCE, 5, np.int32)
    compiled = paged_kv._copy_pages.lower(kv, none, none).compile().as_text()
    assert "input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }" in compiled
    whole = f"[5,{PAGE_SIZE},2,8]"
    assert whole in compiled
    assert not [line for line in compiled.splitlines() if " copy(" in line and whole in line]
