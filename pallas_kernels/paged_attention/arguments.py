"""What the arguments of paged attention must look like, checked before anything is traced.

Knows static facts only (shapes, dtypes, options); the values of arrays are never looked at.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt

from pallas_kernels.bits import bits_dtype

_DTYPES = ("float32", "bfloat16", "float16")

# The bits of query's dtype may be kept as unsigned integers of its width.
Pages = (
    Float[Array, "pages page_size kv_heads head_dim"]
    | UInt[Array, "pages page_size kv_heads head_dim"]
)


def unpacked(keys: Array, dtype: jnp.dtype) -> Array:
    """Returns keys (or values) in this dtype, whether they are kept so or as its bits."""
    return keys if keys.dtype == dtype else lax.bitcast_convert_type(keys, dtype)


def check_arguments(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    sinks: Array | None,
    *,
    scale: float,
    max_query_length: int,
    sliding_window: int | None,
    soft_cap: float | None,
) -> None:
    """Raises unless the arguments fit each other.

    Raises:
      ValueError: the message names the argument, what it is, and what it must be.
    """
    _check_ranks(
        (query, "query", "[tokens heads head_dim]"),
        (key_pages, "key_pages", "[pages page_size kv_heads head_dim]"),
        (value_pages, "value_pages", "[pages page_size kv_heads head_dim]"),
        (block_tables, "block_tables", "[seqs pages_per_seq]"),
        (query_starts, "query_starts", "[seqs+1]"),
        (kv_lengths, "kv_lengths", "[seqs]"),
    )
    tokens, heads, head_dim = query.shape
    pages, page_size, kv_heads, key_dim = key_pages.shape
    seqs, pages_per_seq = block_tables.shape

    if str(query.dtype) not in _DTYPES:
        raise ValueError(f"query must be one of {_DTYPES}, got {query.dtype}")
    for name, array in (("key_pages", key_pages), ("value_pages", value_pages)):
        bits = bits_dtype(query.dtype)
        if array.dtype not in (query.dtype, bits):
            raise ValueError(
                f"{name} must be {query.dtype} like query, or {bits} holding its bits; "
                f"got {array.dtype}"
            )
    integers = (block_tables, "block_tables"), (query_starts, "query_starts")
    for array, name in (*integers, (kv_lengths, "kv_lengths")):
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {array.dtype}")

    if value_pages.shape != key_pages.shape:
        raise ValueError(
            f"value_pages {value_pages.shape} and key_pages {key_pages.shape} must have one shape"
        )
    if key_dim != head_dim:
        raise ValueError(f"head_dim of the pages is {key_dim}, of query {head_dim}; must be equal")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if 0 in (tokens, heads, head_dim, pages, page_size, seqs, pages_per_seq):
        raise ValueError(
            f"no axis may be empty: query {query.shape}, key_pages {key_pages.shape}, "
            f"block_tables {block_tables.shape}; pad with rows that belong to no sequence"
        )
    if query_starts.shape[0] != seqs + 1:
        raise ValueError(
            f"query_starts must have seqs + 1 = {seqs + 1} entries, got {query_starts.shape[0]}"
        )
    if kv_lengths.shape[0] != seqs:
        raise ValueError(f"kv_lengths must have seqs = {seqs} entries, got {kv_lengths.shape[0]}")

    if sinks is not None and (
        sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating)
    ):
        raise ValueError(
            f"sinks must be floats of shape ({heads},), one per head; "
            f"got {sinks.dtype} of shape {sinks.shape}"
        )
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}; usual is head_dim ** -0.5")
    if max_query_length < 1:
        raise ValueError(f"max_query_length must be at least 1, got {max_query_length}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(
            f"sliding_window must be at least 1 (a query sees itself), got {sliding_window}; "
            f"None means no window"
        )
    if soft_cap is not None and not (soft_cap > 0 and math.isfinite(soft_cap)):
        raise ValueError(f"soft_cap must be positive and finite, got {soft_cap}; None means no cap")


def _check_ranks(*expected: tuple[Array, str, str]) -> None:
    for array, name, axes in expected:
        if array.ndim != len(axes.split()):
            raise ValueError(f"{name} must be {axes}, got shape {array.shape}")
