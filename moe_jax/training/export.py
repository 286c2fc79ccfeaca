"""Writes a trained model as a Hugging Face folder, and reads such a folder back for evaluation.

Knows the tensor names of `qwen3_moe` only. Every file is written under another name and renamed,
so a file that carries its name is whole.
"""

import json
import pathlib
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tokenizers import Tokenizer

from host_offload.whole_file import write_whole_file
from moe_jax.config import ModelConfig
from moe_jax.model.weights import ModelWeights
from moe_jax.training.forward import check_trainable
from moe_jax.training.tokenizer import END_OF_TEXT, end_of_text_id

_INDEX = "model.safetensors.index.json"


def hugging_face_config(config: ModelConfig, end_of_text: int) -> dict[str, Any]:
    """The config.json of Qwen3MoeForCausalLM.

    Raises:
      ValueError: the model has a part that qwen3_moe cannot express.
    """
    a, moe = config.attention, config.moe
    check_trainable(config)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": config.vocab,
        "hidden_size": config.embed,
        "intermediate_size": config.dense_ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope.base,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "tie_word_embeddings": config.tied_embeddings,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.ffn,
        "norm_topk_prob": moe.normalise_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def named_tensors(weights: ModelWeights, config: ModelConfig) -> dict[str, Array]:
    """The weights under their Hugging Face names, every fused matrix taken apart."""
    a = config.attention
    cuts = [a.heads * a.head_dim, (a.heads + a.kv_heads) * a.head_dim]
    tensors = {"model.embed_tokens.weight": weights.embedding[...]}
    for index, layer in enumerate(weights.layers):
        name = f"model.layers.{index}."
        attention, router, experts = layer.attention, layer.router, layer.experts
        assert router is not None and experts is not None, "a layer without experts"
        assert attention.query_norm is not None and attention.key_norm is not None, "no q/k norm"
        query, key, value = jnp.split(attention.qkv[...], cuts, axis=0)
        tensors |= {
            name + "input_layernorm.weight": layer.attention_norm[...],
            name + "self_attn.q_proj.weight": query,
            name + "self_attn.k_proj.weight": key,
            name + "self_attn.v_proj.weight": value,
            name + "self_attn.o_proj.weight": attention.output[...],
            name + "self_attn.q_norm.weight": attention.query_norm[...],
            name + "self_attn.k_norm.weight": attention.key_norm[...],
            name + "post_attention_layernorm.weight": layer.ffn_norm[...],
            name + "mlp.gate.weight": router[...],
        }
        for expert in range(config.moe.num_experts):
            part = f"{name}mlp.experts.{expert}."
            gate, up = jnp.split(experts.gate_up[...][expert], 2, axis=0)
            tensors |= {
                part + "gate_proj.weight": gate,
                part + "up_proj.weight": up,
                part + "down_proj.weight": experts.down[...][expert],
            }
    tensors["model.norm.weight"] = weights.final_norm[...]
    if weights.unembedding is not None:
        tensors["lm_head.weight"] = weights.unembedding[...]
    return tensors


def export(
    weights: ModelWeights,
    config: ModelConfig,
    tokenizer: Tokenizer,
    folder: pathlib.Path,
    *,
    shard_bytes: int = 13_000_000,
) -> None:
    """Writes the model in bfloat16 with its tokenizer, in as few shards as the limit allows.

    Raises:
      ValueError: the model is of a kind that is not trained here, or the tokenizer is.
    """
    token = end_of_text_id(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, tensor in named_tensors(weights, config).items():
        value = np.asarray(tensor.astype(jnp.bfloat16))
        if sum(v.nbytes for v in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value
    where = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(shard, file)
        write_whole_file(folder / file, _safetensors(shard))
    total = sum(value.nbytes for shard in shards for value in shard.values())
    _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(folder / "config.json", hugging_face_config(config, token))
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": None, "eos_token_id": token, "do_sample": False},
    )
    write_whole_file(folder / "tokenizer.json", tokenizer.to_str().encode())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "model_max_length": config.max_positions,
            "clean_up_tokenization_spaces": False,
        },
    )


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    write_whole_file(path, (json.dumps(value, indent=2) + "\n").encode())


def _safetensors(tensors: dict[str, np.ndarray]) -> bytes:
    """One shard: length of the header, header, data. NumPy has no bfloat16, so we write it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, value in tensors.items():
        end = start + value.nbytes
        header[name] = {"dtype": "BF16", "shape": value.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(v.tobytes() for v in tensors.values())])
