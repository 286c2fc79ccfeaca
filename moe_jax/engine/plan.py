"""The plan a loaded engine follows, with the speed to expect; it prints itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_jax.config import ModelConfig
from moe_jax.engine.initial_placement import InitialPlacement
from moe_jax.engine.work import busy_seconds, work_costs
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.expected_hits import hit_chances
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.planner import Planner, plan_layer
from moe_jax.placement.timeline import LANES

_PARTS = ("experts on the device", *LANES[1:])
_MOST_RUNS = 6
# Numbers of hits that are less likely make no difference that is printed.
_NEVER = 1e-6


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What lives where and what that means for decoding one sequence.

    Attributes:
      memory: the division of device and host memory.
      placement: what decided which experts are resident at first.
      tokens_per_second: predicted decode rate, from costs measured at load.
      limit: what has the most to do in a step, a key of `seconds`; "memory" only where nothing
        that reads it takes longer.
      seconds: predicted work per token of "dense weights" and "experts on the device", which the
        device does, of the "link", the "host", and the host's "memory", that being its reads at
        the full rate. What works side by side does not add up to the time of a step.
      model: one line about the model.
      pieces: into how many pieces each expert was cut; these are what is counted, in `memory` too.
    """

    memory: MemoryPlan
    placement: str
    tokens_per_second: float
    limit: str
    seconds: Mapping[str, float]
    model: str
    pieces: int = 1

    def __str__(self) -> str:
        work = ", ".join(f"{part} {1e3 * spent:.3g} ms" for part, spent in self.seconds.items())
        return "\n".join(
            [
                self.model,
                str(self.memory),
                f"placement      {self.placement}",
                *_layer_lines(self.memory, "pieces resident" if self.pieces > 1 else "resident"),
                f"decode         predicted {self.tokens_per_second:.1f} tokens/s for one sequence, "
                f"limited by {self.limit}",
                f"  per token    {work}",
            ]
        )


def make_plan(
    config: ModelConfig,
    memory: MemoryPlan,
    placed: InitialPlacement,
    curves: CostCurves,
    backend: str,
    planner: Planner = plan_layer,
) -> Plan:
    """Predicts the decode rate of one sequence whose tokens meet residents as `placed` expects."""
    # Dense weights are read at the rate at which a resident expert's are.
    expert = float(curves.device_seconds(jnp.int32(1)))
    dense = memory.dense_bytes / memory.expert_bytes * expert
    total, waiting, work = dense, 0.0, np.zeros(len(LANES))
    kinds = zip(memory.slots, memory.experts, placed.hits, strict=True)
    for (slots, experts, share), layers in groupby(sorted(kinds)):
        if not experts:
            continue
        count = len(list(layers))
        predicted, for_memory, busy = _plan_token(config, slots, experts, share, curves, planner)
        total += count * predicted
        waiting += count * for_memory
        work += count * busy
    seconds = {"dense weights": dense} | dict(zip(_PARTS, work.tolist(), strict=True))
    # Others read memory: it limits only where the experts mostly take as long as it does.
    binds = waiting > 0.5 * (total - dense)
    limits = {part: spent for part, spent in seconds.items() if part != "memory" or binds}
    attention, moe = config.attention, config.moe
    cut = f" in {moe.pieces} pieces each" if moe.pieces > 1 else ""
    model = (
        f"{config.family}: {config.layers} layers, {moe.routed_experts} experts{cut} "
        f"(top-{moe.routed_per_token}), embed {config.embed}, "
        f"{attention.heads} heads, on {backend}"
    )
    return Plan(
        memory=memory,
        placement=placed.source,
        tokens_per_second=1 / total if total else float("inf"),
        limit=max(limits, key=lambda part: limits[part]),
        seconds=seconds,
        model=model,
        pieces=moe.pieces,
    )


def _plan_token(
    config: ModelConfig,
    slots: int,
    experts: int,
    share: float,
    curves: CostCurves,
    planner: Planner,
) -> tuple[float, float, Float[np.ndarray, " resources"]]:
    """What a layer's experts do for a token, this share of whose choices are hits, on average.

    Their seconds, those of them in which memory is what all wait for, and the work of `LANES`.
    """
    chosen = config.moe.experts_per_token
    costs, resident = work_costs(curves, 1), jnp.arange(experts) < slots
    seconds, waiting, work = 0.0, 0.0, np.zeros(len(LANES))
    for hits, chance in enumerate(hit_chances(experts, slots, chosen, share).tolist()):
        if chance < _NEVER:
            continue
        counts = np.zeros(experts, np.int32)
        counts[:hits] = 1
        counts[slots : slots + chosen - hits] = 1
        plan = planner(jnp.asarray(counts), resident, curves)
        busy = busy_seconds(np.asarray(plan.mode)[None], counts[None], costs)
        predicted = float(plan.predicted)
        seconds += chance * predicted
        if 0 < busy["memory"] >= 0.999 * predicted:
            waiting += chance * predicted
        work += chance * np.array(list(busy.values()))
    return seconds, waiting, work


def _layer_lines(memory: MemoryPlan, unit: str) -> list[str]:
    """Which layers have how many slots; layers that are alike on one line."""
    alike: dict[tuple[int, int], list[int]] = {}
    for layer, kind in enumerate(zip(memory.slots, memory.experts, strict=True)):
        alike.setdefault(kind, []).append(layer)
    return [
        f"  {_runs(layers):<13}" + (f"{slots} of {experts} {unit}" if experts else "dense")
        for (slots, experts), layers in alike.items()
    ]


def _runs(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "layers 0-2, 5: "."""
    found: list[list[int]] = []
    for layer in layers:
        if found and found[-1][-1] == layer - 1:
            found[-1].append(layer)
        else:
            found.append([layer])
    if len(found) > _MOST_RUNS:
        return f"{len(layers)} layers from {layers[0]} to {layers[-1]}: "
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
    return f"layer{'s' if len(layers) > 1 else ''} {text}: "
