"""Every array a served model needs: its name, its shape, and what its blocks of rows mean.

Knows no file format and no tensor name of any checkpoint.
"""

import math
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.model.weights import ModelWeights

Part = Literal["query", "key", "value", "gate", "up"]


def expected_targets(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all arrays of a served model by name, in the order in which they are loaded.

    Names are paths in `ModelWeights` joined by dots; the routed experts follow, layer by layer, as
    `layers.L.experts.E.gate_up` [2 ffn, embed] and `layers.L.experts.E.down` [embed, ffn].
    """
    abstract = nnx.eval_shape(lambda: ModelWeights(config, jnp.dtype("float32")))
    dense = nnx.to_flat_state(nnx.state(abstract))
    targets = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in dense}
    gate_up, down = config.expert_shapes
    for layer in range(config.layers):
        if config.moe_layers[layer]:
            for expert in range(config.moe.num_experts):
                targets[f"layers.{layer}.experts.{expert}.gate_up"] = gate_up
                targets[f"layers.{layer}.experts.{expert}.down"] = down
    return targets


def target_bytes(config: ModelConfig, dtype: jnp.dtype) -> int:
    """Bytes of all arrays of a served model."""
    return jnp.dtype(dtype).itemsize * sum(map(math.prod, expected_targets(config).values()))


def parts_of(target: str) -> tuple[Part, ...]:
    """The blocks of rows that a target is made of, in order; empty where it is one block."""
    leaf = target.rpartition(".")[2]
    if leaf in ("qkv", "qkv_bias"):
        return ("query", "key", "value")
    return ("gate", "up") if leaf == "gate_up" else ()


def part_rows(config: ModelConfig, target: str, part: Part | None) -> slice:
    """The rows of a target that one of its parts fills; None: all rows."""
    assert part is None or part in parts_of(target), f"{target} has no part {part}"
    if part is None:
        return slice(None)
    if part in ("gate", "up"):
        ffn = _ffn(config, target)
        return slice(0, ffn) if part == "gate" else slice(ffn, 2 * ffn)
    a = config.attention
    key = a.heads * a.head_dim
    value = key + a.kv_heads * a.head_dim
    starts = {"query": (0, key), "key": (key, value), "value": (value, a.qkv_width)}
    return slice(*starts[part])


def _ffn(config: ModelConfig, target: str) -> int:
    """Hidden width of the feed-forward block that a gate_up target belongs to."""
    owners = target.split(".")
    if "experts" in owners:
        return config.moe.ffn
    if "shared" in owners:
        assert config.moe.shared_ffn is not None, f"{target} in a model without a shared expert"
        return config.moe.shared_ffn
    return config.dense_ffn
