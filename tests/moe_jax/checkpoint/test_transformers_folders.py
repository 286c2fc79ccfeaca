"""Folders that the installed Transformers writes open, whole and sharded, for every family."""

import numpy as np
import pytest

from moe_jax.checkpoint import open_checkpoint

pytestmark = pytest.mark.golden
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "8KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("layout", [{}, {"save_original_format": False}], ids=["single", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_opens_what_transformers_writes(tmp_path, load, memory, family, layout, options):
    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(tmp_path, **layout, **options)
    arrays = load(open_checkpoint(tmp_path), "float32", memory)
    theirs = {key: value.numpy() for key, value in model.state_dict().items()}
    bank = theirs["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(4):
        np.testing.assert_array_equal(arrays[f"layers.0.experts.{expert}.gate_up"], bank[expert])
    assert sum(array.size for array in arrays.values()) == sum(a.size for a in theirs.values())
