import re

import pytest

from moe_jax.families import FAMILIES, Rule, resolve, tensor_rules

LAYER = "model.layers.12."
EXPERTS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "olmoe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen2_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def where(name: str, family: str, **kwargs) -> tuple[str, str | None, str]:
    target, rule = resolve(name, tensor_rules(family, **kwargs))
    return target, rule.part, rule.layout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "target", "part"),
    [
        ("model.embed_tokens.weight", "embedding", None),
        ("model.norm.weight", "final_norm", None),
        ("lm_head.weight", "unembedding", None),
        (LAYER + "input_layernorm.weight", "layers.12.attention_norm", None),
        (LAYER + "post_attention_layernorm.weight", "layers.12.ffn_norm", None),
        (LAYER + "self_attn.q_proj.weight", "layers.12.attention.qkv", "query"),
        (LAYER + "self_attn.k_proj.weight", "layers.12.attention.qkv", "key"),
        (LAYER + "self_attn.v_proj.weight", "layers.12.attention.qkv", "value"),
        (LAYER + "self_attn.o_proj.weight", "layers.12.attention.output", None),
    ],
)
def test_tensors_that_every_family_has(family, name, target, part):
    assert where(name, family) == (target, part, "plain")


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_come_one_by_one_or_as_a_bank(family):
    block, gate, up, down = EXPERTS[family]
    expert, target = LAYER + block + ".experts.30.", "layers.12.experts.30."
    assert where(expert + gate + ".weight", family) == (target + "gate_up", "gate", "plain")
    assert where(expert + up + ".weight", family) == (target + "gate_up", "up", "plain")
    assert where(expert + down + ".weight", family) == (target + "down", None, "plain")
    assert where(LAYER + block + ".gate.weight", family)[0] == "layers.12.router"
    bank, target = LAYER + "mlp.experts.", "layers.12.experts.*."
    assert where(bank + "gate_up_proj", family) == (target + "gate_up", None, "bank")
    assert where(bank + "down_proj", family) == (target + "down", None, "bank")
    assert where(LAYER + "mlp.gate.weight", family)[0] == "layers.12.router"


@pytest.mark.parametrize(
    ("name", "families", "target", "part"),
    [
        ("self_attn.k_proj.bias", "qwen2_moe qwen3_moe olmoe", "attention.qkv_bias", "key"),
        ("self_attn.o_proj.bias", "qwen3_moe olmoe", "attention.output_bias", None),
        ("self_attn.q_norm.weight", "qwen3_moe olmoe", "attention.query_norm", None),
        ("self_attn.k_norm.weight", "qwen3_moe olmoe", "attention.key_norm", None),
        ("mlp.gate_proj.weight", "qwen2_moe qwen3_moe", "ffn.gate_up", "gate"),
        ("mlp.up_proj.weight", "qwen2_moe qwen3_moe", "ffn.gate_up", "up"),
        ("mlp.down_proj.weight", "qwen2_moe qwen3_moe", "ffn.down", None),
        ("mlp.shared_expert.gate_proj.weight", "qwen2_moe", "shared.ffn.gate_up", "gate"),
        ("mlp.shared_expert.up_proj.weight", "qwen2_moe", "shared.ffn.gate_up", "up"),
        ("mlp.shared_expert.down_proj.weight", "qwen2_moe", "shared.ffn.down", None),
        ("mlp.shared_expert_gate.weight", "qwen2_moe", "shared.gate", None),
    ],
)
def test_tensors_that_only_some_families_have(name, families, target, part):
    for family in FAMILIES:
        if family in families.split():
            assert where(LAYER + name, family) == (f"layers.12.{target}", part, "plain")
        else:
            with pytest.raises(ValueError, match=re.escape(repr(LAYER + name))):
                where(LAYER + name, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ignored_tensors_say_why(family):
    for name in ("model.rotary_emb.inv_freq", LAYER + "self_attn.rotary_emb.inv_freq"):
        target, rule = resolve(name, tensor_rules(family))
        assert target == "" and rule.reason == (
            "the frequencies are computed from the config; old checkpoints stored them"
        )
    target, rule = resolve("lm_head.weight", tensor_rules(family, tied_embeddings=True))
    assert target == "" and rule.reason == "the config ties it to the embedding"
    assert all((rule.target == "") == (rule.reason is not None) for rule in tensor_rules(family))


@pytest.mark.parametrize(
    "name", ["", "model.layers.x.mlp.gate.weight", "xmodel.norm.weight", "model.norm.weight.x"]
)
def test_a_name_without_a_rule_is_refused(name):
    with pytest.raises(ValueError, match=f"no rule uses the checkpoint tensor {name!r}.*another"):
        resolve(name, tensor_rules("mixtral"))


def test_a_name_with_two_rules_is_refused():
    rules = (Rule("a.*", "x"), Rule(".*b", "y"))
    assert resolve("a", rules) == ("x", rules[0])
    with pytest.raises(ValueError, match=r"2 rules match the checkpoint tensor 'ab': \['a"):
        resolve("ab", rules)
