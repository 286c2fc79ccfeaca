"""Attention of a ragged batch of queries over keys and values kept in pages.

Knows arrays, not models: no projections, no rotary positions, no cache bookkeeping.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, no_type_check, overload

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.choose import choose
from pallas_kernels.interpret import TPU_INTERPRETER
from pallas_kernels.paged_attention.arguments import Pages, check_arguments
from pallas_kernels.paged_attention.gpu import paged_attention_gpu
from pallas_kernels.paged_attention.reference import paged_attention_reference
from pallas_kernels.paged_attention.tpu import paged_attention_tpu
from pallas_kernels.paged_attention.tpu_tiles import lane_packing
from pallas_kernels.paged_attention.xla import paged_attention_xla

__all__ = ["IMPLEMENTATIONS", "lane_packing", "paged_attention"]

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "reference": paged_attention_reference,
    "xla": paged_attention_xla,
    "gpu": paged_attention_gpu,
    "tpu": paged_attention_tpu,
    "gpu_interpret": functools.partial(paged_attention_gpu, interpret=True),
    "tpu_interpret": functools.partial(paged_attention_tpu, interpret=TPU_INTERPRETER),
}

_Attended = Float[Array, "tokens heads head_dim"]
_LogSumExp = Float[Array, "tokens heads"]


@overload
def paged_attention(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    *,
    scale: float,
    max_query_length: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_log_sum_exp: Literal[False] = False,
    implementation: str | None = None,
) -> Array: ...


@overload
def paged_attention(
    query: Array,
    key_pages: Array,
    value_pages: Array,
    block_tables: Array,
    query_starts: Array,
    kv_lengths: Array,
    *,
    scale: float,
    max_query_length: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Array | None = None,
    return_log_sum_exp: Literal[True],
    implementation: str | None = None,
) -> tuple[Array, Array]: ...


@no_type_check  # wrong shapes get the messages of check_arguments, in tests as in use
def paged_attention(
    query: Float[Array, "tokens heads head_dim"],
    key_pages: Pages,
    value_pages: Pages,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs+1"],
    kv_lengths: Int[Array, " seqs"],
    *,
    scale: float,
    max_query_length: int,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " heads"] | None = None,
    return_log_sum_exp: bool = False,
    implementation: str | None = None,
) -> _Attended | tuple[_Attended, _LogSumExp]:
    """Causal attention of each sequence's newest tokens over all its keys, through block tables.

    The exact meaning is `reference.paged_attention_reference`. Scores, softmax and sums are
    float32; products take the dtype of the inputs.

    Args:
      query: float32, bfloat16 or float16. Rows query_starts[s]:query_starts[s+1] belong to
        sequence s; rows past query_starts[-1] are padding. heads is a multiple of kv_heads;
        kv head j serves heads j*(heads/kv_heads) and the ones after it.
      key_pages, value_pages: in query's dtype, or its bits as unsigned integers (`as_bits`).
        Key p of sequence s lies in page block_tables[s, p // page_size] at p % page_size. Keep
        bits on the CPU: with jax 0.10.2 a write into a bfloat16 array there rewrites all of it.
        On a TPU keep `lane_packing` heads side by side and reshape for the call, which is free;
        pages with other unfilled lanes are copied whole.
      block_tables: page ids. Entries that hold no visible key may be anything.
      query_starts: non-decreasing, starting at 0. A sequence may have no queries.
      kv_lengths: keys per sequence, those of its current queries included, so the n queries of
        s stand at positions kv_lengths[s] - n up to kv_lengths[s] - 1. May be 0 without queries.
      scale: factor on the scores, usually head_dim ** -0.5.
      max_query_length: static bound on the queries of any sequence; 1 in decode. A sequence
        with more queries than this gets undefined rows.
      sliding_window: the query at position p sees keys q with p - sliding_window < q <= p, as in
        Hugging Face configs; None: all q <= p. Pages wholly before the window are not read.
      soft_cap: scores become soft_cap * tanh(score / soft_cap), before masking.
      sinks: per head, a score that joins the softmax with no value (gpt-oss).
      return_log_sum_exp: whether to return the second result.
      implementation: a key of IMPLEMENTATIONS; None: the backend's default.

    Returns:
      The attended values in query's dtype, 0 in padding rows; with return_log_sum_exp also the
      float32 [tokens heads] natural logarithm of the softmax denominator (sink included), minus
      infinity where a row saw no key. NaN and infinities in padding rows, free pages, unused
      tails of pages or before every window never reach a result.

    Raises:
      ValueError: a shape, dtype or option does not fit, or there is no such implementation.
    """
    attend = choose("paged_attention", IMPLEMENTATIONS, implementation)
    options = {
        "scale": scale,
        "max_query_length": max_query_length,
        "sliding_window": sliding_window,
        "soft_cap": soft_cap,
    }
    integers = (block_tables, query_starts, kv_lengths)
    check_arguments(query, key_pages, value_pages, *integers, sinks, **options)
    integers = (array.astype(jnp.int32) for array in integers)
    output, log_sum_exp = attend(query, key_pages, value_pages, *integers, sinks, **options)
    return (output, log_sum_exp) if return_log_sum_exp else output
