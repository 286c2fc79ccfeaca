"""Parameters, named and shaped; nothing here computes.

Every matrix is [out, in], as in the checkpoint. Query, key and value are one matrix, and so are
gate and up: fewer and larger products. Routed experts are not part of the tree when a model is
served (they live in host memory or device slots, see `moe_jax.model.experts`); for training,
`with_experts=True` adds them as one bank per layer.
"""

import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig


def _parameter(shape: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs | None) -> nnx.Param:
    """Zeros, or for matrices with rngs a normal draw scaled by the input width."""
    if rngs is None:
        return nnx.Param(jnp.zeros(shape, dtype))
    return nnx.Param((rngs.normal(shape) * shape[-1] ** -0.5).astype(dtype))


class AttentionWeights(nnx.Module):
    """Projections of one attention layer.

    qkv [(heads + 2 kv_heads) head_dim, embed], rows ordered query, key, value;
    output [embed, heads head_dim].
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None = None):
        a = config.attention
        self.qkv = _parameter((a.qkv_width, config.embed), dtype, rngs)
        self.output = _parameter((config.embed, a.heads * a.head_dim), dtype, rngs)
        self.qkv_bias = nnx.Param(jnp.zeros(a.qkv_width, dtype)) if a.qkv_bias else None
        self.output_bias = nnx.Param(jnp.zeros(config.embed, dtype)) if a.output_bias else None
        if a.qk_norm == "none":
            self.query_norm = self.key_norm = None
        else:
            heads, kv_heads = (a.heads, a.kv_heads) if a.qk_norm == "full" else (1, 1)
            self.query_norm = nnx.Param(jnp.ones(heads * a.head_dim, dtype))
            self.key_norm = nnx.Param(jnp.ones(kv_heads * a.head_dim, dtype))


class FfnWeights(nnx.Module):
    """A gated feed-forward block: gate_up [2 ffn, embed] (gate rows first), down [embed, ffn]."""

    def __init__(self, embed: int, ffn: int, dtype: jnp.dtype, rngs: nnx.Rngs | None = None):
        self.gate_up = _parameter((2 * ffn, embed), dtype, rngs)
        self.down = _parameter((embed, ffn), dtype, rngs)


class SharedExpertWeights(nnx.Module):
    """The expert every token uses, scaled by the sigmoid of its own gate [1, embed]."""

    def __init__(self, embed: int, ffn: int, dtype: jnp.dtype, rngs: nnx.Rngs | None = None):
        self.ffn = FfnWeights(embed, ffn, dtype, rngs)
        self.gate = _parameter((1, embed), dtype, rngs)


class ExpertBankWeights(nnx.Module):
    """All routed experts of a layer, for training.

    gate_up [experts, 2 ffn, embed], down [experts, embed, ffn].
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None = None):
        gate_up, down = config.expert_shapes
        self.gate_up = _parameter((config.moe.num_experts, *gate_up), dtype, rngs)
        self.down = _parameter((config.moe.num_experts, *down), dtype, rngs)


class LayerWeights(nnx.Module):
    """One transformer layer: `ffn` if dense, `router` and perhaps `shared` if it has experts."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None = None,
        with_experts: bool = False,
    ):
        self.attention_norm = nnx.Param(jnp.ones(config.embed, dtype))
        self.attention = AttentionWeights(config, dtype, rngs)
        self.ffn_norm = nnx.Param(jnp.ones(config.embed, dtype))
        moe, embed, shared_ffn = config.moe_layers[layer], config.embed, config.moe.shared_ffn
        router_shape = (config.moe.routed_experts, embed)
        self.ffn = None if moe else FfnWeights(embed, config.dense_ffn, dtype, rngs)
        self.router = _parameter(router_shape, dtype, rngs) if moe else None
        self.shared = (
            SharedExpertWeights(embed, shared_ffn, dtype, rngs) if moe and shared_ffn else None
        )
        self.experts = ExpertBankWeights(config, dtype, rngs) if moe and with_experts else None


class ModelWeights(nnx.Module):
    """The whole model: embedding [vocab, embed], layers, final_norm, unembedding [vocab, embed].

    With tied embeddings `unembedding` is None and `embedding` serves twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        rngs: nnx.Rngs | None = None,
        with_experts: bool = False,
    ):
        self.embedding = _parameter((config.vocab, config.embed), dtype, rngs)
        self.layers = nnx.List(
            [
                LayerWeights(config, layer, dtype, rngs, with_experts)
                for layer in range(config.layers)
            ]
        )
        self.final_norm = nnx.Param(jnp.ones(config.embed, dtype))
        tied = config.tied_embeddings
        self.unembedding = None if tied else _parameter((config.vocab, config.embed), dtype, rngs)
