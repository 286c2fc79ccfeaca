"""From hidden states to rotated queries, keys and values, and back; not the attention itself.

The product of queries with keys is `pallas_kernels.paged_attention` when serving and a plain
causal form when training.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.config import ModelConfig
from moe_jax.model.ops import linear, rms_norm
from moe_jax.model.rope import rotate
from moe_jax.model.weights import AttentionWeights


def project_qkv(
    weights: AttentionWeights,
    x: Float[Array, "tokens embed"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    config: ModelConfig,
) -> tuple[
    Float[Array, "tokens heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
]:
    """Projects, normalises, clamps and rotates, in this order; values are only clamped."""
    a = config.attention
    bias = None if weights.qkv_bias is None else weights.qkv_bias[...]
    qkv = linear(weights.qkv[...], x, bias)
    query, kv = jnp.split(qkv, [a.heads * a.head_dim], axis=1)
    if weights.query_norm is not None:
        query = _normalise(query, weights.query_norm[...], config.norm_epsilon)
    query = _clamp(query.reshape(-1, a.heads, a.head_dim), a.clip_qkv)
    return rotate(query, cos, sin), *_finish_kv(weights, kv, cos, sin, config)


def project_kv(
    weights: AttentionWeights,
    x: Float[Array, "tokens embed"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    config: ModelConfig,
) -> tuple[Float[Array, "tokens kv_heads head_dim"], Float[Array, "tokens kv_heads head_dim"]]:
    """The keys and values of `project_qkv`, without the queries."""
    first = config.attention.heads * config.attention.head_dim
    bias = None if weights.qkv_bias is None else weights.qkv_bias[first:]
    return _finish_kv(weights, linear(weights.qkv[first:], x, bias), cos, sin, config)


def _finish_kv(
    weights: AttentionWeights,
    kv: Float[Array, "tokens _"],
    cos: Float[Array, "tokens half"],
    sin: Float[Array, "tokens half"],
    config: ModelConfig,
) -> tuple[Float[Array, "tokens kv_heads head_dim"], Float[Array, "tokens kv_heads head_dim"]]:
    a = config.attention
    key, value = jnp.split(kv, 2, axis=1)
    if weights.key_norm is not None:
        key = _normalise(key, weights.key_norm[...], config.norm_epsilon)
    key, value = (
        _clamp(part.reshape(-1, a.kv_heads, a.head_dim), a.clip_qkv) for part in (key, value)
    )
    return rotate(key, cos, sin), value


def _clamp(x: Float[Array, "*shape"], limit: float | None) -> Float[Array, "*shape"]:
    return x if limit is None else jnp.clip(x, -limit, limit)


def _normalise(
    x: Float[Array, "tokens width"], scale: Float[Array, " features"], epsilon: float
) -> Float[Array, "tokens width"]:
    """RMS norm over as many features as there are scales: one head, or the whole width."""
    return rms_norm(x.reshape(x.shape[0], -1, scale.size), scale, epsilon).reshape(x.shape)


def project_output(
    weights: AttentionWeights, x: Float[Array, "tokens heads head_dim"]
) -> Float[Array, "tokens embed"]:
    """Projects the heads' outputs back to the width of the model."""
    bias = None if weights.output_bias is None else weights.output_bias[...]
    return linear(weights.output[...], x.reshape(x.shape[0], -1), bias)
