"""Pages: who gets them, and what is written into them."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.cache.paged_kv import PAGE_SIZE, LayerKv, assign_pages, pages_for, write_kv


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
