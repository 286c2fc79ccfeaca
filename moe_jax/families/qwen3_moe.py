"""Qwen3-MoE: its config.json and its tensor names.

Knows no arrays. What the mathematics needs to know, as Transformers 5.23 computes it:

* Queries and keys are RMS-normed over each head with one weight [head_dim] for all heads, after
  the projection and its bias, before rope, with the model's `rms_norm_eps`.
* `attention_bias` adds a bias to query, key, value and output.
* `head_dim` is hidden_size / num_attention_heads where absent.
* The gates are the softmax over all experts and are normalised only with `norm_topk_prob`.
* With `use_sliding_window` the window applies to every layer; `max_window_layers` is in the
  published configs but read by nobody.
* A layer is dense if mlp_only_layers names it or decoder_sparse_step skips it.
* Transformers 5 writes num_local_experts where everyone else writes num_experts.
"""

from collections.abc import Mapping

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.families.common import (
    read_model,
    read_num_experts,
    read_sizes,
    read_sparse_layers,
)
from moe_jax.families.fields import FieldReader
from moe_jax.families.rules import (
    ATTENTION_RULES,
    DENSE_FFN_RULES,
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
    *DENSE_FFN_RULES,
    *expert_rules("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
)


def config_from_huggingface(raw: Mapping[str, object]) -> ModelConfig:
    """Turns a Qwen3-MoE config.json into a ModelConfig.

    Raises:
      ValueError: a field is missing, has a wrong type or value, or is not known.
    """
    fields = FieldReader(raw, "config.json of qwen3_moe: ")
    sizes = read_sizes(fields, default_kv_heads=4)
    bias = fields.flag("attention_bias", False)
    if fields.flag("use_sliding_window", False):
        window = fields.size("sliding_window", 4096)
    else:
        fields.optional_size("sliding_window", minimum=0)
        window = None
    return read_model(
        fields,
        family="qwen3_moe",
        attention=AttentionConfig(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            qkv_bias=bias,
            output_bias=bias,
            qk_norm="head",
        ),
        moe=MoEConfig(
            num_experts=read_num_experts(fields, "num_experts", "num_local_experts"),
            experts_per_token=fields.size("num_experts_per_tok"),
            ffn=fields.size("moe_intermediate_size"),
            normalise_gates=fields.flag("norm_topk_prob", False),
        ),
        dense_ffn=fields.size("intermediate_size", 6144),
        moe_layers=read_sparse_layers(fields, sizes.layers),
        windows=(window,) * sizes.layers,
        default_max_positions=32_768,
        default_norm_epsilon=1e-6,
        irrelevant=frozenset({"max_window_layers"}),
    )
