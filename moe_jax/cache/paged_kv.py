"""Keys and values in fixed-size pages, one array pair per layer.

Knows pages and positions; which sequence owns which page is decided outside.
"""

from dataclasses import dataclass
from functools import partial
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Shaped

from host_offload.memory import zeros
from moe_jax.config import ModelConfig
from pallas_kernels.bits import as_bits, bits_dtype
from pallas_kernels.paged_attention import lane_packing

PAGE_SIZE = 16
_COPIES_AT_ONCE = 8


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerKv:
    """The pages of one layer, as the backend likes them (`storage_dtype`, `storage_heads`)."""

    keys: Shaped[Array, "pages page_size packs width"]
    values: Shaped[Array, "pages page_size packs width"]

    def by_head(
        self, head_dim: int
    ) -> tuple[
        Shaped[Array, "pages page_size kv_heads head_dim"],
        Shaped[Array, "pages page_size kv_heads head_dim"],
    ]:
        """Keys and values with an axis for every head; a view."""
        view = lambda pages: pages.reshape(*pages.shape[:2], -1, head_dim)
        return view(self.keys), view(self.values)


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PageCopies:
    """Pages to be copied, one entry per row of the pool; unused entries name no page.

    Attributes:
      source: pages to read.
      target: pages to overwrite, none of them a source.
    """

    source: Int32[Array | np.ndarray, " rows"]
    target: Int32[Array | np.ndarray, " rows"]


def kv_bytes_per_page(config: ModelConfig, itemsize: int) -> int:
    """Bytes of one page over all layers, keys and values together."""
    a = config.attention
    return 2 * config.layers * PAGE_SIZE * a.kv_heads * a.head_dim * itemsize


def storage_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """How pages of this dtype are kept: as themselves, on the CPU backend as their bits.

    XLA:CPU of jax 0.10 rewrites a whole bfloat16 array to change a part of it, integers in place.
    """
    return bits_dtype(np.dtype(dtype)) if jax.default_backend() == "cpu" else np.dtype(dtype)


def storage_heads(kv_heads: int, head_dim: int) -> tuple[int, int]:
    """The last two axes of pages: on a TPU, heads side by side until they fill its lanes."""
    packing = lane_packing(kv_heads, head_dim) if jax.default_backend() == "tpu" else 1
    return kv_heads // packing, packing * head_dim


def allocate_kv(config: ModelConfig, pages: int, dtype: jax.typing.DTypeLike) -> list[LayerKv]:
    """Empty pages for every layer, in device memory."""
    a = config.attention
    shape = (pages, PAGE_SIZE, *storage_heads(a.kv_heads, a.head_dim))
    empty = lambda: zeros(shape, storage_dtype(dtype), "device")
    return [LayerKv(empty(), empty()) for _ in range(config.layers)]


def write_kv(
    kv: LayerKv,
    slot: Int[Array, " tokens"],
    key: Float[Array, "tokens kv_heads head_dim"],
    value: Float[Array, "tokens kv_heads head_dim"],
) -> LayerKv:
    """Stores each token's key and value at its slot (page · page_size + offset).

    Slots past the last page are dropped: that is where padding tokens go.
    """

    page_size = kv.keys.shape[1]

    def write(pages, rows):
        if rows.dtype != pages.dtype:
            rows = as_bits(rows)
        rows = rows.reshape(-1, *pages.shape[2:])
        # By page and offset: with one flat index, XLA:CPU copies all pages to write a single token.
        return pages.at[slot // page_size, slot % page_size].set(rows, mode="drop")

    return LayerKv(write(kv.keys, key), write(kv.values, value))


def copy_pages(kv: list[LayerKv], copies: PageCopies) -> list[LayerKv]:
    """Copies pages of all layers in one program; DONATES kv, unless there is nothing to copy.

    Few of the entries are in use as a rule, and a program reads as many pages as it has entries:
    it is called with a few at a time.
    """
    pages = kv[0].keys.shape[0]
    # As numpy: the copies are found on the host, the pages may be on an accelerator.
    source, target = np.asarray(copies.source), np.asarray(copies.target)
    due = np.flatnonzero(target < pages)
    for start in range(0, due.size, _COPIES_AT_ONCE):
        some = due[start : start + _COPIES_AT_ONCE]
        padding = (0, _COPIES_AT_ONCE - some.size)
        padded = [np.pad(a[some], padding, constant_values=pages) for a in (source, target)]
        kv = _copy_pages(kv, *padded)
    return kv


@partial(jax.jit, donate_argnums=0)
def _copy_pages(kv, source, target):
    def copy(pages):
        return pages.at[target].set(pages.at[source].get(mode="fill"), mode="drop")

    return jax.tree.map(copy, kv)


def pages_for(tokens: int) -> int:
    """How many pages hold this many tokens."""
    return -(-tokens // PAGE_SIZE)
