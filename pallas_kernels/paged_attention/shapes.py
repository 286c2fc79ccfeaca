"""The attention of real models, by name: what tests, tuning and benchmarks run.

Knows sizes, not weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The heads of one attention layer, and how it differs from plain causal attention."""

    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    sinks: bool = False


HEADS: Mapping[str, Heads] = {
    "mixtral_8x7b": Heads(heads=32, kv_heads=8, head_dim=128),
    "qwen3_30b_a3b": Heads(heads=32, kv_heads=4, head_dim=128),
    "olmoe_1b_7b": Heads(heads=16, kv_heads=16, head_dim=128),
    "gpt_oss_20b": Heads(heads=64, kv_heads=8, head_dim=64, sliding_window=128, sinks=True),
    "deepseek_v2_lite": Heads(heads=16, kv_heads=16, head_dim=192),
}
