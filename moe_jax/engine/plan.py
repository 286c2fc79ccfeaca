"""The plan a loaded engine follows, with the speed to expect; it prints itself."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.planner import Mode, Planner, plan_layer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What lives where and what that means for decoding one sequence.

    Attributes:
      memory: the division of device and host memory.
      tokens_per_second: predicted decode rate, from costs measured at load.
      limit: what takes most of a step: "dense weights", "resident experts", "link" or "host".
      model: one line about the model.
    """

    memory: MemoryPlan
    tokens_per_second: float
    limit: str
    model: str

    def __str__(self) -> str:
        return (
            f"{self.model}\n{self.memory}\n"
            f"decode         predicted {self.tokens_per_second:.1f} tokens/s, "
            f"limited by {self.limit}"
        )


def make_plan(
    config: ModelConfig,
    memory: MemoryPlan,
    curves: CostCurves,
    backend: str,
    planner: Planner = plan_layer,
) -> Plan:
    """Predicts the decode rate of one sequence whose tokens choose experts evenly."""
    expert = float(curves.device_seconds(jnp.int32(1)))
    # Dense weights are read at the rate at which a resident expert's are.
    parts = {"dense weights": memory.dense_bytes / memory.expert_bytes * expert}
    parts |= {"resident experts": 0.0, "link": 0.0, "host": 0.0}
    total = parts["dense weights"]
    for slots, experts in zip(memory.slots, memory.experts, strict=True):
        if not experts:
            continue
        chosen = config.moe.experts_per_token
        hits = round(chosen * slots / experts)
        counts = np.zeros(experts, np.int32)
        counts[:hits] = 1
        counts[slots : slots + chosen - hits] = 1
        layer = planner(jnp.asarray(counts), jnp.arange(experts) < slots, curves)
        mode = np.asarray(layer.mode)
        total += float(layer.predicted)
        host = float(curves.host_seconds(jnp.int32(1)))
        parts["resident experts"] += int((mode == Mode.RESIDENT).sum()) * expert
        parts["link"] += int((mode == Mode.STREAM).sum()) * float(curves.stream)
        parts["host"] += _times(int((mode == Mode.HOST).sum()), host)
    attention = config.attention
    model = (
        f"{config.family}: {config.layers} layers, {config.moe.num_experts} experts "
        f"(top-{config.moe.experts_per_token}), embed {config.embed}, "
        f"{attention.heads} heads, on {backend}"
    )
    return Plan(
        memory=memory,
        tokens_per_second=1 / total if total else float("inf"),
        limit=max(parts, key=lambda name: parts[name]),
        model=model,
    )


def _times(count: int, cost: float) -> float:
    """count · cost, where nothing of an infinite cost is nothing."""
    return count * cost if count else 0.0
