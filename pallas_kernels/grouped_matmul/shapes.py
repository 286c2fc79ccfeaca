"""The expert products of real models, by name: what tests, tuning and benchmarks run.

Knows sizes, not weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The routed experts of one layer: gate_up is [2 ffn, embed], down [embed, ffn]."""

    experts: int
    choices: int
    embed: int
    ffn: int


EXPERTS: Mapping[str, Experts] = {
    "mixtral_8x7b": Experts(experts=8, choices=2, embed=4096, ffn=14336),
    "qwen3_30b_a3b": Experts(experts=128, choices=8, embed=2048, ffn=768),
    "olmoe_1b_7b": Experts(experts=64, choices=8, embed=2048, ffn=1024),
    "gpt_oss_20b": Experts(experts=32, choices=4, embed=2880, ffn=2880),
    "deepseek_v2_lite": Experts(experts=64, choices=6, embed=2048, ffn=1408),
}
