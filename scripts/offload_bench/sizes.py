"""How many layers of a model to measure, and with how much device memory.

Pure arithmetic over sizes, rates and seconds; measures nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from offload_bench.task import LONG_SECONDS, WARM_UP_TOKENS, Line, Task

from host_offload.memory import format_bytes
from moe_jax.config import ModelConfig
from moe_jax.engine.batch import PREFILL_BUCKETS
from moe_jax.engine.sizing import device_memory_for, plan_for
from moe_jax.families import read_config
from moe_jax.placement.memory_plan import MemoryPlan

WHOLE_BUDGET = 24 * 10**9
LEAST_LAYERS = 2
# Of the experts: with more on the device, how the others run hardly shows.
MOST_RESIDENT = 2 / 3
# The rest is for what else runs, and for what loading needs for a moment.
_MEMORY_SHARE, _DISK_SHARE = 0.7, 0.9
# Guesses on the slow side: with a layer too many, ways are left out. bytes/s and seconds.
_WRITE_RATE = 0.2e9
_LOAD_RATE = 1e9
_LINK_RATE = 20e9
_START_SECONDS = 45.0  # of a way: processes, programs, costs of experts


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What there is for a measurement.

    Attributes:
      host_bytes: memory of the host.
      device_bytes: the budget on a device; 0 where the device is the host.
      disk_bytes: free where the checkpoint will be written.
      seconds: for everything, writing the checkpoint included; None: any time.
    """

    host_bytes: int
    device_bytes: int
    disk_bytes: int
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a model in bfloat16.

    Attributes:
      layers: of the whole model.
      common_bytes, layer_bytes, expert_bytes: all that is in no layer, a layer, an expert of it.
      experts, experts_per_token: of a layer.
    """

    layers: int
    common_bytes: int
    layer_bytes: int
    expert_bytes: int
    experts: int
    experts_per_token: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Sizes":
        """Those of a config.json whose layers are alike."""
        one, two = (_plan(config, layers) for layers in (1, 2))
        layer = two.dense_bytes - one.dense_bytes + one.experts[0] * one.expert_bytes
        return cls(
            layers=config["num_hidden_layers"],
            common_bytes=2 * one.dense_bytes - two.dense_bytes,
            layer_bytes=layer,
            expert_bytes=one.expert_bytes,
            experts=one.experts[0],
            experts_per_token=read_config(config).moe.experts_per_token,
        )

    def bytes_of(self, layers: int) -> int:
        """All weights of so many layers."""
        return self.common_bytes + layers * self.layer_bytes


def choose_layers(
    sizes: Sizes, limits: Limits, ways: int, lines: Sequence[Line], repeats: int
) -> tuple[int, str]:
    """The most layers that can be measured, and what allows no more.

    Two are measured even where the time is short: what was measured until then counts.

    Raises ValueError where memory or disk are too small for two layers.
    """
    least, limit = min(LEAST_LAYERS, sizes.layers), "the whole model"
    for layers in range(sizes.layers, least - 1, -1):
        size = sizes.bytes_of(layers)
        # A budget that would hold most of it is cut: `choose_budget`.
        on_host = size - min(limits.device_bytes, size // 5)
        if on_host > _MEMORY_SHARE * limits.host_bytes:
            limit = f"host memory of {format_bytes(limits.host_bytes)}"
        elif size > _DISK_SHARE * limits.disk_bytes:
            limit = f"free disk of {format_bytes(limits.disk_bytes)}"
        elif (
            limits.seconds is not None
            and seconds_needed(sizes, layers, ways, lines, repeats) > limits.seconds
        ):
            limit = f"time of {limits.seconds:.0f} s"
        else:
            return layers, limit
    if limit.startswith("time"):
        return least, limit
    raise ValueError(
        f"{least} layers take {format_bytes(sizes.bytes_of(least))}, which is too much for "
        f"{limit}; give a smaller --shape, or free some"
    )


def seconds_needed(
    sizes: Sizes, layers: int, ways: int, lines: Sequence[Line], repeats: int
) -> float:
    """A guess at the time for the checkpoint and so many ways: all experts used are streamed."""
    streaming = 0.0
    for line in lines:
        rows = line.beams if line.decode else line.prompt
        experts = min(rows * sizes.experts_per_token, sizes.experts)
        step = layers * experts * sizes.expert_bytes / _LINK_RATE
        steps = line.decode or math.ceil(line.prompt / PREFILL_BUCKETS[-1])
        warm_up = min(line.decode, WARM_UP_TOKENS) or steps
        runs = min(repeats, math.ceil(LONG_SECONDS / (steps * step)))
        streaming += step * (warm_up + runs * steps)
    size = sizes.bytes_of(layers)
    return size / _WRITE_RATE + ways * (_START_SECONDS + size / _LOAD_RATE + streaming)


def choose_budget(
    config: Mapping[str, Any], whole_layers: int, task: Task, device_bytes: int
) -> tuple[int, str]:
    """The device memory that a checkpoint cut from so many layers is measured with, and why.

    24 GB, or what the device has; where most of the experts fit into that, as much as gives the
    same share of them a place as of the whole model's.
    """
    budget = min(WHOLE_BUDGET, device_bytes)
    sizes = {"max_tokens": task.max_tokens, "max_seqs": task.max_seqs}

    def share(layers: int) -> float:
        plan = _plan(config, layers, budget, **sizes)
        return plan.resident_experts / sum(plan.experts)

    if share(config["num_hidden_layers"]) <= MOST_RESIDENT:
        return (
            budget,
            "24 GB by default" if budget == WHOLE_BUDGET else "all that the device has",
        )
    part = min(share(whole_layers), MOST_RESIDENT)
    why = f"for {part:.0%} of the experts, as most of so few fit into {format_bytes(budget)}"
    return device_memory_for(task.folder, experts=part, **sizes), why


def _plan(
    config: Mapping[str, Any],
    layers: int,
    device_bytes: int = 1 << 62,
    max_tokens: int = 16,
    max_seqs: int = 1,
) -> MemoryPlan:
    cut: ModelConfig = read_config({**config, "num_hidden_layers": layers})
    return plan_for(
        cut,
        device_bytes=device_bytes,
        host_bytes=1 << 62,
        dtype="bfloat16",
        max_tokens=max_tokens,
        max_seqs=max_seqs,
    )
