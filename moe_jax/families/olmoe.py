"""OLMoE: its config.json and its tensor names.

Knows no arrays. What the mathematics needs to know, as Transformers 5.23 computes it:

* Queries and keys are RMS-normed over their full width (all heads together), with the model's
  `rms_norm_eps`. The order is: projection and bias, norm, `clip_qkv`, split into heads, rope.
  Values are clipped too, without a norm.
* `attention_bias` adds a bias to query, key, value and output.
* The gates are the softmax over all experts and are normalised only with `norm_topk_prob`.
* Every layer is a layer of experts, and there is no sliding window.
"""

from collections.abc import Mapping

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.families.common import read_model, read_num_experts, read_sizes
from moe_jax.families.fields import POSITIVE, FieldReader
from moe_jax.families.rules import (
    ATTENTION_RULES,
    OUTER_RULES,
    OUTPUT_BIAS_RULE,
    QK_NORM_RULES,
    QKV_BIAS_RULES,
    Rule,
    expert_rules,
)

TENSOR_RULES: tuple[Rule, ...] = (
    *OUTER_RULES,
    *ATTENTION_RULES,
    *QKV_BIAS_RULES,
    OUTPUT_BIAS_RULE,
    *QK_NORM_RULES,
    *expert_rules("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)


def config_from_huggingface(raw: Mapping[str, object]) -> ModelConfig:
    """Turns an OLMoE config.json into a ModelConfig.

    Raises:
      ValueError: a field is missing, has a wrong type or value, or is not known.
    """
    fields = FieldReader(raw, "config.json of olmoe: ")
    sizes = read_sizes(fields, default_kv_heads=None)
    if sizes.heads * sizes.head_dim != sizes.embed:
        # Transformers sizes the query norm by hidden_size, so nothing else can be computed.
        fields.refuse(
            "head_dim",
            sizes.head_dim,
            f"hidden_size / num_attention_heads ({sizes.embed} / {sizes.heads}), "
            "because the query norm spans hidden_size",
        )
    bias = fields.flag("attention_bias", False)
    ffn = fields.size("intermediate_size")
    fields.only("sliding_window", None, "olmoe attends to everything before")
    return read_model(
        fields,
        family="olmoe",
        attention=AttentionConfig(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="full",
            clip_qkv=fields.optional_number("clip_qkv", bound=POSITIVE),
        ),
        moe=MoEConfig(
            num_experts=read_num_experts(fields, "num_experts", "num_local_experts"),
            experts_per_token=fields.size("num_experts_per_tok"),
            ffn=ffn,
            normalise_gates=fields.flag("norm_topk_prob", False),
        ),
        dense_ffn=ffn,
        moe_layers=(True,) * sizes.layers,
        windows=(None,) * sizes.layers,
        default_max_positions=4096,
        default_norm_epsilon=1e-5,
    )
