"""Writes a tiny random checkpoint in Hugging Face format: two MoE layers around a dense one."""

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers.pre_tokenizers import ByteLevel

VOCAB = 300
MODEL = {
    "model_type": "qwen3_moe",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 3,
    "mlp_only_layers": [1],
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
EOS = 0
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def make_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<eos>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    text = "one mixture of many small experts, some of them on the host; "
    tokenizer.train_from_iterator([text[i:] + text[:i] for i in range(0, 60, 7)], trainer)
    return tokenizer


def random_tensors(readable: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 1.5 / shape[-1] ** 0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": draw(VOCAB, 16) * 4, "model.norm.weight": draw(16) + 1}
    # Tokens that are no plain text keep a logit of 0, so that greedy text can be read.
    head = tensors["lm_head.weight"] = np.zeros((VOCAB, 16), np.float32)
    head[readable] = draw(len(readable), 16)
    for layer in range(3):
        here = f"model.layers.{layer}"
        for norm, width in (("input_layernorm", 16), ("post_attention_layernorm", 16)):
            tensors[f"{here}.{norm}.weight"] = 1 + draw(width)
        for name, shape in {"q": (32, 16), "k": (16, 16), "v": (16, 16), "o": (16, 32)}.items():
            tensors[f"{here}.self_attn.{name}_proj.weight"] = draw(*shape)
        for name in "qk":
            tensors[f"{here}.self_attn.{name}_norm.weight"] = 1 + draw(8)
        blocks = {f"{here}.mlp": 24}
        if layer != 1:
            tensors[f"{here}.mlp.gate.weight"] = draw(4, 16)
            blocks = {f"{here}.mlp.experts.{expert}": 12 for expert in range(4)}
        for block, width in blocks.items():
            tensors[f"{block}.gate_proj.weight"] = draw(width, 16)
            tensors[f"{block}.up_proj.weight"] = draw(width, 16)
            tensors[f"{block}.down_proj.weight"] = draw(16, width)
    return tensors


def write_tiny_checkpoint(folder: Path) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.get_vocab_size() <= VOCAB
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    readable = sorted(ids[text] for text in ids if text.isascii() and ids[text] != EOS)
    save_file(random_tensors(readable), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MODEL))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    (folder / "chat_template.jinja").write_text(CHAT)
