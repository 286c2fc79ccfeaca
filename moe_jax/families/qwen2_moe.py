"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): its config.json and its tensor names.

Knows no arrays. What the mathematics needs to know, as Transformers 5.23 computes it:

* Query, key and value have a bias (`qkv_bias`, on unless said otherwise), the output never.
* A shared expert runs for every token of a layer of experts, times the sigmoid of its own gate;
  its output is added to the routed experts' before the residual.
* The gates are the softmax over all experts and are normalised only with `norm_topk_prob`.
* With `use_sliding_window` the window applies to layers 0, 2, 4, ... below `max_window_layers`
  (every second one; the original code meant other layers), or where `layer_types` says so.
  Without it `sliding_window` is ignored; Transformers then writes 0.
* A layer is dense if mlp_only_layers names it or decoder_sparse_step skips it.
"""

from collections.abc import Mapping

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.families.common import read_model, read_sizes, read_sparse_layers
from moe_jax.families.fields import FieldReader
from moe_jax.families.rules import (
    ATTENTION_RULES,
    DENSE_FFN_RULES,
    LAYER,
    OUTER_RULES,
    QKV_BIAS_RULES,
    Rule,
    expert_rules,
)

SHARED = LAYER + r"mlp\.shared_expert"
TENSOR_RULES: tuple[Rule, ...] = (
    *OUTER_RULES,
    *ATTENTION_RULES,
    *QKV_BIAS_RULES,
    *DENSE_FFN_RULES,
    *expert_rules("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
    Rule(SHARED + r"\.gate_proj\.weight", r"layers.\1.shared.ffn.gate_up", "gate"),
    Rule(SHARED + r"\.up_proj\.weight", r"layers.\1.shared.ffn.gate_up", "up"),
    Rule(SHARED + r"\.down_proj\.weight", r"layers.\1.shared.ffn.down"),
    Rule(SHARED + r"_gate\.weight", r"layers.\1.shared.gate"),
)
WINDOWED = {"full_attention": False, "sliding_attention": True}


def config_from_huggingface(raw: Mapping[str, object]) -> ModelConfig:
    """Turns a Qwen2-MoE config.json into a ModelConfig.

    Raises:
      ValueError: a field is missing, has a wrong type or value, or is not known.
    """
    fields = FieldReader(raw, "config.json of qwen2_moe: ")
    sizes = read_sizes(fields, default_kv_heads=16)
    return read_model(
        fields,
        family="qwen2_moe",
        attention=AttentionConfig(
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.head_dim,
            qkv_bias=fields.flag("qkv_bias", True),
        ),
        moe=MoEConfig(
            num_experts=fields.size("num_experts"),
            experts_per_token=fields.size("num_experts_per_tok"),
            ffn=fields.size("moe_intermediate_size"),
            shared_ffn=fields.size("shared_expert_intermediate_size"),
            normalise_gates=fields.flag("norm_topk_prob", False),
        ),
        dense_ffn=fields.size("intermediate_size", 5632),
        moe_layers=read_sparse_layers(fields, sizes.layers),
        windows=_read_windows(fields, sizes.layers),
        default_max_positions=32_768,
        default_norm_epsilon=1e-6,
    )


def _read_windows(fields: FieldReader, layers: int) -> tuple[int | None, ...]:
    """Per layer the window, from use_sliding_window, max_window_layers and layer_types."""
    used = fields.flag("use_sliding_window", False)
    last = fields.size("max_window_layers", 28, minimum=0)
    windowed = fields.optional_choices("layer_types", WINDOWED)
    if windowed is None:
        windowed = tuple(used and layer % 2 == 0 and layer < last for layer in range(layers))
    if len(windowed) != layers:
        fields.refuse("layer_types", f"{len(windowed)} entries", f"a list of {layers} layers")
    if not used:
        fields.optional_size("sliding_window", minimum=0)
        if any(windowed):
            fields.refuse(
                "layer_types",
                fields.take("layer_types"),
                "full_attention everywhere while use_sliding_window is off",
            )
        return (None,) * layers
    window = fields.size("sliding_window", 4096)
    return tuple(window if w else None for w in windowed)
