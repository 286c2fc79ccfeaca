"""Mixtral: its config.json and its tensor names.

Knows no arrays. What the mathematics needs to know, as Transformers 5.23 computes it:

* Every layer is a layer of experts; the gates of a token's experts are always normalised.
* The router's softmax is in float32 over all experts, then the top ones are taken.
* No bias anywhere, no query or key norm.
* `sliding_window` applies to every layer: position p sees p - window + 1 .. p.
* One `rms_norm_eps` for all norms. A norm is computed in float32, rounded to the model's dtype
  and only then multiplied by its weight (so in all four families).
"""

from collections.abc import Mapping

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.families.common import read_model, read_num_experts, read_sizes
from moe_jax.families.fields import FieldReader
from moe_jax.families.rules import ATTENTION_RULES, OUTER_RULES, Rule, expert_rules

TENSOR_RULES: tuple[Rule, ...] = (
    *OUTER_RULES,
    *ATTENTION_RULES,
    *expert_rules("(?:block_sparse_moe|mlp)", gate="w1", up="w3", down="w2"),
)


def config_from_huggingface(raw: Mapping[str, object]) -> ModelConfig:
    """Turns a Mixtral config.json into a ModelConfig.

    Raises:
      ValueError: a field is missing, has a wrong type or value, or is not known.
    """
    fields = FieldReader(raw, "config.json of mixtral: ")
    sizes = read_sizes(fields, default_kv_heads=None if fields.has("num_key_value_heads") else 8)
    ffn = fields.size("intermediate_size")
    window = fields.optional_size("sliding_window")
    fields.only("attention_bias", False, "mixtral has no biases")
    fields.only("norm_topk_prob", True, "mixtral always normalises")
    return read_model(
        fields,
        family="mixtral",
        attention=AttentionConfig(
            heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim
        ),
        moe=MoEConfig(
            num_experts=read_num_experts(fields, "num_local_experts", "num_experts"),
            experts_per_token=fields.size("num_experts_per_tok"),
            ffn=ffn,
        ),
        dense_ffn=ffn,
        moe_layers=(True,) * sizes.layers,
        windows=(window,) * sizes.layers,
        default_max_positions=131_072,
        default_norm_epsilon=1e-5,
        default_rope_base=1e6,
        irrelevant=frozenset({"router_jitter_noise"}),
    )
