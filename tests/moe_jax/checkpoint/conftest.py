"""Hugging Face folders of tiny random models, written by hand, and what they hold per target."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest

FORMAT_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)} | {
    "BF16": np.dtype(ml_dtypes.bfloat16)
}
EXPERTS = 3
# Biases, a shared expert, and a dense layer after one with experts; all sizes differ.
CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 10,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 5,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


class Folder(NamedTuple):
    """A checkpoint on disk, the tensors in it, and what a load in the same dtype must give."""

    path: Path
    tensors: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]


def write_safetensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": FORMAT_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = b"".join(array.tobytes() for array in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tensors_and_targets(dtype: str, fused: bool) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype])

    tensors, targets = {}, {}

    def one(name: str, target: str, *shape: int) -> None:
        tensors[name] = targets[target] = draw(*shape)

    def several(names: list[str], target: str, *shapes: tuple[int, ...]) -> None:
        new = {name: draw(*shape) for name, shape in zip(names, shapes, strict=True)}
        tensors.update(new)
        targets[target] = np.concatenate(list(new.values()))

    def ffn(block: str, target: str, width: int) -> None:
        names = [f"{block}.gate_proj.weight", f"{block}.up_proj.weight"]
        several(names, f"{target}.gate_up", (width, 8), (width, 8))
        one(f"{block}.down_proj.weight", f"{target}.down", 8, width)

    one("model.embed_tokens.weight", "embedding", 11, 8)
    one("lm_head.weight", "unembedding", 11, 8)
    one("model.norm.weight", "final_norm", 8)
    for layer in range(2):
        here, there = f"model.layers.{layer}", f"layers.{layer}"
        one(f"{here}.input_layernorm.weight", f"{there}.attention_norm", 8)
        one(f"{here}.post_attention_layernorm.weight", f"{there}.ffn_norm", 8)
        projections = [f"{here}.self_attn.{letter}_proj" for letter in "qkv"]
        weights, biases = ([f"{p}.{kind}" for p in projections] for kind in ("weight", "bias"))
        several(weights, f"{there}.attention.qkv", (8, 8), (4, 8), (4, 8))
        several(biases, f"{there}.attention.qkv_bias", (8,), (4,), (4,))
        one(f"{here}.self_attn.o_proj.weight", f"{there}.attention.output", 8, 8)
    ffn("model.layers.1.mlp", "layers.1.ffn", 10)
    block = "model.layers.0.mlp"
    one(f"{block}.gate.weight", "layers.0.router", EXPERTS, 8)
    one(f"{block}.shared_expert_gate.weight", "layers.0.shared.gate", 1, 8)
    ffn(f"{block}.shared_expert", "layers.0.shared.ffn", 5)
    if fused:
        for kind, shape in {"gate_up": (EXPERTS, 12, 8), "down": (EXPERTS, 8, 6)}.items():
            bank = tensors[f"{block}.experts.{kind}_proj"] = draw(*shape)
            targets.update({f"layers.0.experts.{e}.{kind}": bank[e] for e in range(EXPERTS)})
    else:
        for expert in range(EXPERTS):
            ffn(f"{block}.experts.{expert}", f"layers.0.experts.{expert}", 6)
    return tensors, targets


def write_folder(
    path: Path,
    dtype: str = "BF16",
    fused: bool = False,
    shards: int = 0,
    edit: Callable[[dict[str, np.ndarray]], object] = lambda tensors: None,
) -> Folder:
    """Writes a folder; 0 shards: one file without an index. `edit` changes the tensors first."""
    path.mkdir()
    tensors, targets = tensors_and_targets(dtype, fused)
    edit(tensors)
    (path / "config.json").write_text(json.dumps(CONFIG))
    if not shards:
        write_safetensors(path / "model.safetensors", tensors)
        return Folder(path, tensors, targets)
    names, weight_map = list(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = {name: tensors[name] for name in names[shard::shards]}
        write_safetensors(path / file, mine)
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return Folder(path, tensors, targets)


@pytest.fixture(scope="session")
def make_folder_at() -> Callable[..., Folder]:
    return write_folder


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Folder]:
    return lambda **options: write_folder(tmp_path / "model", **options)


@pytest.fixture(scope="session")
def make_safetensors() -> Callable[[Path, Mapping[str, np.ndarray]], None]:
    return write_safetensors


@pytest.fixture(scope="session")
def memory() -> Callable[[str], jax.sharding.Sharding]:
    """Experts go to pinned host memory, everything else to the device."""
    device = jax.devices()[0]
    shardings = {
        kind: jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
        for kind in ("device", "pinned_host")
    }
    return lambda name: shardings["pinned_host" if ".experts." in name else "device"]


@pytest.fixture(scope="session")
def load() -> Callable[..., dict[str, jax.Array]]:
    """Loads a checkpoint into a dict; every array must come once."""

    def load(checkpoint, dtype, sharding, **options) -> dict[str, jax.Array]:
        arrays: dict[str, jax.Array] = {}

        def receive(name: str, array: jax.Array) -> None:
            assert name not in arrays
            arrays[name] = array

        checkpoint.load(dtype, sharding, receive, **options)
        return arrays

    return load
