import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moe_jax.checkpoint.targets import expected_targets
from moe_jax.families import FAMILIES, read_config, resolve, tensor_rules
from moe_jax.model.rope import static_frequencies
from tests.golden.models import GRID, grid_id, save_tiny, tiny_model

pytestmark = pytest.mark.golden

ACTIVATIONS = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


def expected_windows(config):
    """Per layer the window of Transformers' masks."""
    if config.model_type == "qwen2_moe":
        kinds = config.layer_types
        return tuple(config.sliding_window if "sliding" in kind else None for kind in kinds)
    return (getattr(config, "sliding_window", None),) * config.num_hidden_layers


@pytest.mark.parametrize("entry", GRID, ids=grid_id)
def test_config_means_what_transformers_makes_of_it(entry, tmp_path):
    family, overrides = entry
    model = tiny_model(family, **overrides)
    save_tiny(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert [name for name in raw if name.startswith("rope_s")] == [
        name for name in overrides if name.startswith("rope_s")
    ]
    ours, layers = read_config(raw), model.model.layers
    attention, experts = layers[0].self_attn, [hasattr(layer.mlp, "experts") for layer in layers]
    assert ours.moe_layers == tuple(experts)
    assert ours.windows == expected_windows(model.config)
    block = layers[experts.index(True)].mlp
    assert ours.activation == ACTIVATIONS[type(block.experts.act_fn).__name__]
    assert ours.moe.experts_per_token == block.gate.top_k
    assert ours.moe.normalise_gates == getattr(block.gate, "norm_topk_prob", True)
    assert ours.norm_epsilon == model.model.norm.variance_epsilon
    assert ours.attention.head_dim**-0.5 == attention.scaling
    assert ours.attention.clip_qkv == getattr(model.config, "clip_qkv", None)
    assert ours.max_positions == model.config.max_position_embeddings
    assert ours.tied_embeddings == (model.lm_head.weight is model.model.embed_tokens.weight)
    rotary = model.model.rotary_emb
    assert ours.rope.kind == rotary.rope_type
    assert ours.rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    if ours.rope.kind not in ("dynamic", "longrope"):
        mine = static_frequencies(ours.rope, ours.attention.head_dim)
        np.testing.assert_allclose(mine, rotary.inv_freq.numpy(), rtol=1.3e-7)


def rows_of(target, part, tensor, config):
    """Where a tensor's first row lies in its target, and how many rows it has."""
    a = config.attention
    starts = {"key": a.heads * a.head_dim, "value": (a.heads + a.kv_heads) * a.head_dim}
    start = len(tensor) if part == "up" else starts.get(part, 0)
    return slice(start, start + len(tensor))


def fill(folder, config):
    """A checkpoint's tensors put where the rules say, as NumPy arrays; NaN where nothing went."""
    weights = {name: np.full(shape, np.nan) for name, shape in expected_targets(config).items()}
    for file in folder.glob("*.safetensors"):
        with transformers.modeling_utils.safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name).numpy()
                target, rule = resolve(name, tensor_rules(config.family, config.tied_embeddings))
                if rule.layout == "bank":
                    for expert, one in enumerate(tensor):
                        weights[target.replace("*", str(expert))][:] = one
                else:
                    weights[target][rows_of(target, rule.part, tensor, config)] = tensor
    return weights


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("mixtral", {}),
        ("olmoe", {"attention_bias": True}),
        ("qwen2_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True, "head_dim": 12}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
    ],
)
def test_every_layout_that_transformers_writes_fills_the_same_weights(family, overrides, tmp_path):
    assert family in FAMILIES
    model = tiny_model(family, **overrides)
    config = None
    layouts = {
        "plain": {},
        "fused": {"fused": True},
        "sharded": {"sharded": True},
    }
    filled = {}
    for layout, options in layouts.items():
        save_tiny(model, tmp_path / layout, **options)
        config = read_config(json.loads((tmp_path / layout / "config.json").read_text()))
        filled[layout] = fill(tmp_path / layout, config)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    for name, weight in filled["plain"].items():
        assert not np.isnan(weight).any(), name
        np.testing.assert_array_equal(weight, filled["fused"][name])
        np.testing.assert_array_equal(weight, filled["sharded"][name])
