"""The meaning of paged attention, stated as plainly as possible.

Knows nothing about speed: every token reads its sequence's whole block table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.arguments import Pages, unpacked


def paged_attention_reference(
    query: Float[Array, "tokens heads head_dim"],
    key_pages: Pages,
    value_pages: Pages,
    block_tables: Int[Array, "seqs pages_per_seq"],
    query_starts: Int[Array, " seqs+1"],
    kv_lengths: Int[Array, " seqs"],
    sinks: Float[Array, " heads"] | None,
    *,
    scale: float,
    max_query_length: int,
    sliding_window: int | None,
    soft_cap: float | None,
) -> tuple[Float[Array, "tokens heads head_dim"], Float[Array, "tokens heads"]]:
    """Attends one token at a time; see `pallas_kernels.paged_attention` for the arguments.

    Returns:
      The attended values in query's dtype, and the float32 log-sum-exp of each row's scores
      (sink included). A row that sees no key gives 0 and minus infinity.
    """
    del max_query_length  # only a bound for implementations that lay queries out by sequence
    tokens, heads, _ = query.shape
    seqs, pages_per_seq = block_tables.shape
    page_size, kv_heads = key_pages.shape[1:3]
    key_pages, value_pages = (unpacked(pages, query.dtype) for pages in (key_pages, value_pages))
    key_positions = jnp.arange(pages_per_seq * page_size)

    def attend(token: Int[Array, ""]) -> tuple[Array, Array]:
        # The first sequence that ends after this token; one past the last for padding.
        seq = jnp.sum(query_starts[1:] <= token)
        table = block_tables.at[seq].get(mode="fill", fill_value=0)
        kv_length = kv_lengths.at[seq].get(mode="fill", fill_value=0)
        end = query_starts.at[seq + 1].get(mode="fill", fill_value=0)
        position = kv_length - end + token
        visible = (key_positions <= position) & (key_positions < kv_length) & (seq < seqs)
        if sliding_window is not None:
            visible &= key_positions > position - sliding_window

        # A page id that names no page may stand in unused entries; reading 0 there is harmless.
        keys = key_pages.at[table].get(mode="fill", fill_value=0)
        values = value_pages.at[table].get(mode="fill", fill_value=0)
        keys = keys.reshape(key_positions.size, kv_heads, -1).astype(jnp.float32)
        values = values.reshape(key_positions.size, kv_heads, -1).astype(jnp.float32)
        # 0 times NaN is NaN, so what is not seen leaves the sum here and not only the scores.
        values = jnp.where(visible[:, None, None], values, 0)
        keys = jnp.repeat(keys, heads // kv_heads, axis=1)
        values = jnp.repeat(values, heads // kv_heads, axis=1)

        row = query[token].astype(jnp.float32)
        scores = jnp.einsum("hd,phd->hp", row, keys, precision="highest") * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(visible[None, :], scores, -jnp.inf)
        if sinks is not None:
            scores = jnp.concatenate([scores, sinks[:, None].astype(jnp.float32)], axis=1)
        log_sum_exp = jax.nn.logsumexp(scores, axis=1)
        weights = jnp.exp(scores - log_sum_exp[:, None])[:, : key_positions.size]
        attended = jnp.einsum("hp,phd->hd", weights, values, precision="highest")
        seen = visible.any()
        return (
            jnp.where(seen, attended, 0).astype(query.dtype),
            jnp.where(seen, log_sum_exp, -jnp.inf),
        )

    return jax.lax.map(attend, jnp.arange(tokens))
