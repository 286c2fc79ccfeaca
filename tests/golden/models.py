"""Tiny random Hugging Face models of every family, for comparing with Transformers.

Not a test: `tiny_model` builds one, `GRID` lists the settings worth comparing, `save_tiny` writes a
checkpoint. Needs torch and transformers.
"""

import copy
import json
import os
from collections.abc import Mapping

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

TEST_LENGTH = 48  # tokens: longer than every window and every trained context in the grid

CONFIGS: Mapping[str, type[PreTrainedConfig]] = {
    "mixtral": MixtralConfig,
    "olmoe": OlmoeConfig,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3_moe": Qwen3MoeConfig,
}

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

DEFAULTS: Mapping[str, Mapping[str, object]] = {
    # Transformers cannot derive head_dim for the scaled kinds of rope in Mixtral.
    "mixtral": {"num_local_experts": 5, "head_dim": 8},
    "olmoe": {"num_experts": 6},
    "qwen2_moe": {
        "num_experts": 7,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
    },
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8},
}

SHORT = [1.0, 1.1, 1.3, 1.7]
LONG = [1.5, 3.0, 5.0, 9.0]
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
LONGROPE = {
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 32,
}


def new_rope(kind: str, **settings) -> dict[str, object]:
    """The spelling of Transformers 5: everything inside rope_parameters."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **settings}}


def old_rope(kind: str, **settings) -> dict[str, object]:
    """The spelling of Transformers 4: rope_theta beside rope_scaling, `type` inside."""
    return {"rope_theta": 5000.0, "rope_scaling": {"type": kind, **settings}}


GRID: list[tuple[str, dict[str, object]]] = [
    ("mixtral", {}),
    ("mixtral", {"num_key_value_heads": 4, "head_dim": None}),
    ("mixtral", {"head_dim": 12, "num_key_value_heads": 1, "num_experts_per_tok": 1}),
    ("mixtral", {"sliding_window": 7}),
    ("mixtral", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    ("mixtral", {"hidden_act": "gelu", "num_experts_per_tok": 5}),
    ("mixtral", new_rope("default")),
    ("mixtral", new_rope("linear", factor=3.0)),
    ("mixtral", new_rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}),
    ("mixtral", new_rope("yarn", **YARN)),
    ("mixtral", new_rope("yarn", **YARN, truncate=False, beta_fast=4.0, beta_slow=0.5)),
    ("mixtral", new_rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5)),
    ("mixtral", new_rope("yarn", **YARN, attention_factor=1.3)),
    ("mixtral", new_rope("longrope", **LONGROPE)),
    ("mixtral", new_rope("longrope", **LONGROPE, factor=2.0)),
    ("mixtral", new_rope("llama3", **LLAMA3)),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False}),
    ("qwen2_moe", {"head_dim": 12, "num_key_value_heads": 4}),
    ("qwen2_moe", {"decoder_sparse_step": 2}),
    ("qwen2_moe", {"mlp_only_layers": [0], "hidden_act": "gelu_pytorch_tanh"}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 9}),
    (
        "qwen2_moe",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("qwen2_moe", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    ("qwen2_moe", old_rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}),
    ("qwen2_moe", old_rope("longrope", **LONGROPE, attention_factor=0.8) | {"head_dim": 8}),
    ("qwen2_moe", new_rope("yarn", **YARN) | {"norm_topk_prob": True}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": True, "attention_bias": True}),
    ("qwen3_moe", {"head_dim": 12, "num_key_value_heads": 1}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [2], "num_hidden_layers": 4}),
    ("qwen3_moe", {"mlp_only_layers": [0, 2], "hidden_act": "relu"}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}),
    ("qwen3_moe", {"tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu_new"}),
    ("qwen3_moe", {"rope_theta": 300.0}),
    ("qwen3_moe", old_rope("linear", factor=3.0)),
    ("qwen3_moe", old_rope("dynamic", factor=4.0) | {"max_position_embeddings": 32}),
    ("qwen3_moe", old_rope("yarn", **YARN)),
    ("qwen3_moe", old_rope("longrope", **LONGROPE)),
    ("qwen3_moe", old_rope("llama3", **LLAMA3)),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    ("olmoe", {"clip_qkv": 0.7}),
    ("olmoe", {"attention_bias": True, "clip_qkv": 1.1, "num_key_value_heads": 1}),
    ("olmoe", {"tie_word_embeddings": True, "rms_norm_eps": 0.1, "hidden_act": "gelu"}),
    ("olmoe", new_rope("linear", factor=3.0)),
    ("olmoe", old_rope("yarn", **YARN)),
    ("olmoe", new_rope("longrope", **LONGROPE)),
    ("olmoe", old_rope("llama3", **LLAMA3)),
]


def grid_id(entry: tuple[str, dict[str, object]]) -> str:
    """A name for a grid entry, for pytest's `ids`."""
    family, overrides = entry
    settings = "-".join(f"{name}={_short(value)}" for name, value in overrides.items())
    return f"{family}-{settings or 'default'}"


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        plain = {name: v for name, v in value.items() if not isinstance(v, list)}
        return ",".join(str(v) for v in plain.values())
    return str(value).replace(" ", "").replace("_attention", "")


def tiny_model(family: str, *, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random float32 model in eval mode with eager attention.

    Every parameter is drawn so that leaving it out, or mixing up two of them, changes the logits:
    norm weights differ from 1, biases from 0, and the router spreads tokens over its experts.
    """
    settings = copy.deepcopy({**COMMON, **DEFAULTS[family], **overrides})
    config = CONFIGS[family](**settings)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_draw(name, noise))
    model.tiny_overrides = copy.deepcopy(overrides)
    return model.eval()


def _draw(name: str, noise: torch.Tensor) -> torch.Tensor:
    """Scales a normal draw to what the parameter of this name needs."""
    if "norm" in name:
        return 1 + 0.3 * noise
    if name.endswith("bias"):
        return 0.5 * noise
    if "embed_tokens" in name:
        return noise
    scale = 3.0 if name.endswith((".gate.weight", "lm_head.weight")) else 1.5
    return scale * noise / noise.shape[-1] ** 0.5


def save_tiny(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    sharded: bool = False,
    fused: bool = False,
) -> None:
    """Writes a checkpoint folder, its config.json in the spelling the model was asked for.

    Args:
      model: from `tiny_model`; it is not changed.
      folder: where; made if absent.
      dtype: what the tensors are stored in.
      sharded: whether to split into about four files with an index.
      fused: whether to write the experts of a layer as one tensor, as Transformers 5 holds them.
    """
    copied = copy.deepcopy(model).to(dtype)
    size = sum(p.numel() * p.element_size() for p in copied.parameters())
    limit = size // 4 if sharded else 2 * size
    copied.save_pretrained(folder, max_shard_size=limit, save_original_format=not fused)
    path = os.path.join(folder, "config.json")
    with open(path, encoding="utf-8") as file:
        written = respell(json.load(file), model.tiny_overrides)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(written, file, indent=2)


def respell(written: dict[str, object], asked: Mapping[str, object]) -> dict[str, object]:
    """A config.json as Transformers 4 would have written it, if that spelling was asked for."""
    old = {
        name: copy.deepcopy(asked[name]) for name in ("rope_scaling", "rope_theta") if name in asked
    }
    if not old:
        return written
    return {name: v for name, v in written.items() if name != "rope_parameters"} | old
