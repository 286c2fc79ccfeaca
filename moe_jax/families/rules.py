"""Tensor names: which checkpoint tensor fills which weight.

Knows names only: shapes, files and dtypes belong to `moe_jax.checkpoint`. Targets are paths in
`moe_jax.model.weights.ModelWeights` joined by dots, and `layers.L.experts.E.gate_up` and `.down`
for routed experts, which live outside that tree.
"""

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

Part = Literal["query", "key", "value", "gate", "up"]


class Rule(NamedTuple):
    """Where one kind of checkpoint tensor goes.

    Attributes:
      source: regular expression that the whole tensor name must match.
      target: `re.sub` template of the weight's path; "" means: ignored on purpose.
      part: the block of rows of the target that the tensor fills; None: all of it.
      layout: "bank" if the tensor stacks all experts of a layer on its first axis,
        [experts, 2 ffn, embed] or [experts, embed, ffn] with gate rows before up rows; the target
        then has `*` in place of the expert.
      reason: why the tensor is ignored; None for a tensor that is used.
    """

    source: str
    target: str
    part: Part | None = None
    layout: Literal["plain", "bank"] = "plain"
    reason: str | None = None


def resolve(name: str, rules: Sequence[Rule]) -> tuple[str, Rule]:
    """Finds the one rule for a checkpoint tensor, and the path of the weight it fills.

    Raises:
      ValueError: no rule, or more than one, matches the name.
    """
    hits = [rule for rule in rules if re.fullmatch(rule.source, name)]
    if not hits:
        raise ValueError(
            f"no rule uses the checkpoint tensor {name!r}; the checkpoint may be of another "
            "model family than its config.json says"
        )
    if len(hits) > 1:
        sources = [rule.source for rule in hits]
        raise ValueError(f"{len(hits)} rules match the checkpoint tensor {name!r}: {sources}")
    return re.sub(hits[0].source, hits[0].target, name), hits[0]


LAYER = r"model\.layers\.(\d+)\."

OUTER_RULES = (
    Rule(r"model\.embed_tokens\.weight", "embedding"),
    Rule(r"model\.norm\.weight", "final_norm"),
    Rule(LAYER + r"input_layernorm\.weight", r"layers.\1.attention_norm"),
    Rule(LAYER + r"post_attention_layernorm\.weight", r"layers.\1.ffn_norm"),
    Rule(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
        "",
        reason="the frequencies are computed from the config; old checkpoints stored them",
    ),
)

UNTIED_RULE = Rule(r"lm_head\.weight", "unembedding")
TIED_RULE = Rule(r"lm_head\.weight", "", reason="the config ties it to the embedding")

ATTENTION_RULES = (
    Rule(LAYER + r"self_attn\.q_proj\.weight", r"layers.\1.attention.qkv", "query"),
    Rule(LAYER + r"self_attn\.k_proj\.weight", r"layers.\1.attention.qkv", "key"),
    Rule(LAYER + r"self_attn\.v_proj\.weight", r"layers.\1.attention.qkv", "value"),
    Rule(LAYER + r"self_attn\.o_proj\.weight", r"layers.\1.attention.output"),
)

QKV_BIAS_RULES = (
    Rule(LAYER + r"self_attn\.q_proj\.bias", r"layers.\1.attention.qkv_bias", "query"),
    Rule(LAYER + r"self_attn\.k_proj\.bias", r"layers.\1.attention.qkv_bias", "key"),
    Rule(LAYER + r"self_attn\.v_proj\.bias", r"layers.\1.attention.qkv_bias", "value"),
)

OUTPUT_BIAS_RULE = Rule(LAYER + r"self_attn\.o_proj\.bias", r"layers.\1.attention.output_bias")

QK_NORM_RULES = (
    Rule(LAYER + r"self_attn\.q_norm\.weight", r"layers.\1.attention.query_norm"),
    Rule(LAYER + r"self_attn\.k_norm\.weight", r"layers.\1.attention.key_norm"),
)

DENSE_FFN_RULES = (
    Rule(LAYER + r"mlp\.gate_proj\.weight", r"layers.\1.ffn.gate_up", "gate"),
    Rule(LAYER + r"mlp\.up_proj\.weight", r"layers.\1.ffn.gate_up", "up"),
    Rule(LAYER + r"mlp\.down_proj\.weight", r"layers.\1.ffn.down"),
)


def expert_rules(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Rules of the router and the routed experts, one tensor per expert or one per layer.

    Args:
      block: regular expression of the module that holds router and experts, such as `mlp`; it
        must not capture.
      gate, up, down: what the family calls an expert's projections when each has its own tensor.
    """
    experts = LAYER + block + r"\.experts\."
    return (
        Rule(LAYER + block + r"\.gate\.weight", r"layers.\1.router"),
        Rule(experts + rf"(\d+)\.{gate}\.weight", r"layers.\1.experts.\2.gate_up", "gate"),
        Rule(experts + rf"(\d+)\.{up}\.weight", r"layers.\1.experts.\2.gate_up", "up"),
        Rule(experts + rf"(\d+)\.{down}\.weight", r"layers.\1.experts.\2.down"),
        Rule(experts + r"gate_up_proj", r"layers.\1.experts.*.gate_up", layout="bank"),
        Rule(experts + r"down_proj", r"layers.\1.experts.*.down", layout="bank"),
    )
