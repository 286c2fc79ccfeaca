"""Causal attention over whole sequences, with its gradient written out.

Knows no cache and no projections.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.training.products import multiply, multiply_transposed, transpose

_BLOCK = 128


def causal_attention(
    query: Float[Array, "seqs positions heads head_dim"],
    key: Float[Array, "seqs positions kv_heads head_dim"],
    value: Float[Array, "seqs positions kv_heads head_dim"],
) -> Float[Array, "seqs positions heads head_dim"]:
    """Softmax attention of every position over itself and those before it.

    Products are in the operands' dtype, scores and softmax in float32. Queries are taken block by
    block, so that scores of later keys are mostly not computed.
    """
    seqs, positions, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    # [seqs kv_heads, group, positions, head_dim]: one batch per head of keys.
    grouped = query.reshape(seqs, positions, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(seqs * kv_heads, -1, positions, head_dim)
    flat_key, flat_value = (
        part.transpose(0, 2, 1, 3).reshape(-1, positions, head_dim) for part in (key, value)
    )
    mixed = []
    for start in range(0, positions, _BLOCK):
        stop = min(start + _BLOCK, positions)
        block = grouped[:, :, start:stop].reshape(seqs * kv_heads, -1, head_dim)
        mixed.append(
            _block(block, flat_key[:, :stop], flat_value[:, :stop], start).reshape(
                seqs * kv_heads, -1, stop - start, head_dim
            )
        )
    together = jnp.concatenate(mixed, axis=2).reshape(seqs, kv_heads, -1, positions, head_dim)
    return together.transpose(0, 3, 1, 2, 4).reshape(seqs, positions, heads, head_dim)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _block(
    query: Float[Array, "batch rows head_dim"],
    key: Float[Array, "batch keys head_dim"],
    value: Float[Array, "batch keys head_dim"],
    start: int,
) -> Float[Array, "batch rows head_dim"]:
    """The rows are queries from position `start` on to the last key, once per head of the group."""
    return _block_forward(query, key, value, start)[0]


def _block_forward(
    query: Array, key: Array, value: Array, start: int
) -> tuple[Array, tuple[Array, ...]]:
    # Scores are [keys, rows]: sums over the first of two axes are vectorised, over the last not.
    keys = key.shape[1]
    scores = multiply_transposed(key, query) * query.shape[-1] ** -0.5
    place = start + jnp.arange(query.shape[1]) % (keys - start)
    seen = jnp.arange(keys)[:, None] <= place[None, :]
    scores = jnp.where(seen[None], scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = (weights / weights.sum(axis=1, keepdims=True)).astype(value.dtype)
    mixed = multiply(transpose(value), probabilities).astype(value.dtype)
    return transpose(mixed), (query, key, value, probabilities, mixed)


def _block_backward(
    start: int, saved: tuple[Array, ...], dmixed: Array
) -> tuple[Array, Array, Array]:
    query, key, value, probabilities, mixed = saved
    dvalue = multiply(probabilities, dmixed)
    wide = transpose(dmixed).astype(jnp.float32) * mixed.astype(jnp.float32)
    dprobabilities = multiply_transposed(value, dmixed)
    dscores = (
        probabilities.astype(jnp.float32)
        * (dprobabilities - wide.sum(axis=1, keepdims=True))
        * query.shape[-1] ** -0.5
    ).astype(query.dtype)
    dquery = transpose(multiply(transpose(key), dscores).astype(query.dtype))
    dkey = multiply(dscores, query)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype)


_block.defvjp(_block_forward, _block_backward)
