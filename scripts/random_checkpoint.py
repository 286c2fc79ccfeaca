"""Makes a checkpoint of random weights in the shape of a real model, in Hugging Face format.

For measuring: time does not depend on what the weights are. One shard per layer is in memory at a
time. OLMoE-1B-7B takes 13.8 GB of disk.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# Large matrices are cut from this many random numbers, each beginning elsewhere: drawing billions
# takes minutes.
_POOL = 1 << 24

SHAPES: dict[str, dict[str, Any]] = {
    # Mixtral in small: 0.8 B parameters, eight layers.
    "mixtral_0.8b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    "mixtral_8x7b": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "rope_theta": 1e6,
        "sliding_window": None,
    },
    "olmoe_1b_7b": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "rope_theta": 1e4,
        "clip_qkv": None,
        "attention_bias": False,
    },
}


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    return SHAPES[shape] | _COMMON


def write_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Makes the checkpoint, unless a complete one of that shape is there already.

    Raises ValueError if the folder holds another one.
    """
    described, indexed = folder / "config.json", folder / "model.safetensors.index.json"
    if described.exists():
        _check_shape(described, config)
        if indexed.exists():
            return
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    size = 0
    for file, tensors in _shards(config):
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    described.write_text(json.dumps(config, indent=1))
    indexed.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))


def _check_shape(path: Path, config: dict[str, Any]) -> None:
    """Raises ValueError if the config.json there is no JSON, or says otherwise than `config`."""
    advice = "give another folder, or delete this one"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; {advice}") from error
    for key, value in config.items():
        if found.get(key) != value:
            raise ValueError(
                f"{path.parent} holds a checkpoint of another shape: its {key} is "
                f"{found.get(key)}, not {value}; {advice}"
            )


def _shards(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    rng = np.random.default_rng(0)
    embed, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = embed // config["num_attention_heads"]
    kv = head_dim * config["num_key_value_heads"]
    mixtral = config["model_type"] == "mixtral"
    experts = config["num_local_experts" if mixtral else "num_experts"]
    block = "block_sparse_moe" if mixtral else "mlp"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")

    pool = rng.standard_normal(_POOL, np.float32)

    def draw(*shape: int) -> np.ndarray:
        size, first = int(np.prod(shape)), int(rng.integers(_POOL))
        numbers = np.resize(np.roll(pool, -first)[:size], shape)
        return (numbers * shape[-1] ** -0.5).astype(bfloat16)

    ones = lambda width: np.ones(width, bfloat16)
    yield (
        "model-embeddings.safetensors",
        {
            "model.embed_tokens.weight": draw(vocab, embed),
            "lm_head.weight": draw(vocab, embed),
            "model.norm.weight": ones(embed),
        },
    )
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        tensors = {
            name + "input_layernorm.weight": ones(embed),
            name + "post_attention_layernorm.weight": ones(embed),
            name + "self_attn.q_proj.weight": draw(embed, embed),
            name + "self_attn.k_proj.weight": draw(kv, embed),
            name + "self_attn.v_proj.weight": draw(kv, embed),
            name + "self_attn.o_proj.weight": draw(embed, embed),
            name + f"{block}.gate.weight": draw(experts, embed),
        }
        if not mixtral:
            tensors[name + "self_attn.q_norm.weight"] = ones(embed)
            tensors[name + "self_attn.k_norm.weight"] = ones(kv)
        for expert in range(experts):
            part = f"{name}{block}.experts.{expert}."
            widths = ((ffn, embed), (ffn, embed), (embed, ffn))
            for matrix, width in zip(names, widths, strict=True):
                tensors[f"{part}{matrix}.weight"] = draw(*width)
        yield f"model-layer-{layer}.safetensors", tensors


def bytes_per_token(config: dict[str, Any]) -> int:
    """bfloat16 weight bytes that one decoded token must read."""
    embed, ffn, layers = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    kv = embed // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = embed * (2 * embed + 2 * kv)
    experts = config["num_experts_per_tok"] * 3 * embed * ffn
    router = config.get("num_local_experts", config.get("num_experts", 0)) * embed
    return 2 * (layers * (attention + experts + router) + config["vocab_size"] * embed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="where the checkpoint goes")
    parser.add_argument("--shape", choices=SHAPES, default="mixtral_0.8b")
    arguments = parser.parse_args()
    write_checkpoint(Path(arguments.folder), config_of(arguments.shape))
    print(f"{arguments.folder}: {arguments.shape}")


if __name__ == "__main__":
    command_line.run(main)
