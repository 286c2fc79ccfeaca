"""Which experts are on the device when a model has been loaded.

Knows sizes and routing traces; neither weights nor devices.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moe_jax.config import ModelConfig
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.residency import profile_placement
from moe_jax.placement.trace import RoutingTrace, load_trace

_NEXT = "record one with scripts/profile_experts.py, or leave placement= out"


@dataclass(frozen=True, kw_only=True)
class InitialPlacement:
    """The experts that are resident at first.

    Attributes:
      slot_expert: per layer, the expert in each slot; a dense layer has none.
      hits: per layer, the share of the tokens' choices that should meet a resident expert.
      source: what this was decided by.
    """

    slot_expert: tuple[Int[np.ndarray, " _slots"], ...]
    hits: tuple[float, ...]
    source: str


def place_experts(placement: Any, config: ModelConfig, memory: MemoryPlan) -> InitialPlacement:
    """Fills the slots of every layer.

    Args:
      placement: "uniform" (all experts are taken to be used alike: the first ones), or the path
        of a routing trace, whose most used experts (by tokens; equal ones by id) get the slots.
      config: the model's.
      memory: how many slots each layer has.

    Raises ValueError for anything else, for files that hold no whole trace, and for traces of
    another model, as far as sizes tell.
    """
    if isinstance(placement, str) and placement == "uniform":
        share = [s / e if e else 0.0 for s, e in zip(memory.slots, memory.experts, strict=True)]
        slots = tuple(np.arange(count) for count in memory.slots)
        return InitialPlacement(slot_expert=slots, hits=tuple(share), source="uniform")
    if not isinstance(placement, str | Path):
        raise ValueError(
            "placement must be 'uniform' or the path of a routing trace, "
            f"got {placement!r}; {_NEXT}"
        )
    trace = _read(Path(placement))
    _check_model(trace, config, placement)
    counts = np.zeros((config.layers, config.moe.num_experts), np.int64)
    used = trace.counts.sum(axis=0, dtype=np.int64)
    counts[trace.layer] = used.repeat(config.moe.pieces, axis=1)
    slots = profile_placement(counts, memory.slots)
    hits = [
        float(row[chosen].sum() / row.sum()) if row.any() else 0.0
        for row, chosen in zip(counts, slots, strict=True)
    ]
    return InitialPlacement(slot_expert=slots, hits=tuple(hits), source=f"profile {placement}")


def _read(path: Path) -> RoutingTrace:
    try:
        return load_trace(path)
    except OSError as error:
        raise ValueError(
            f"placement must be 'uniform' or the path of a routing trace; {path} cannot be read: "
            f"{error.strerror}; {_NEXT}"
        ) from error


def _check_model(trace: RoutingTrace, config: ModelConfig, path: str | Path) -> None:
    layers = np.flatnonzero(config.moe_layers).tolist()
    sizes = {
        "experts": (trace.experts, config.moe.routed_experts),
        "experts per token": (trace.experts_per_token, config.moe.routed_per_token),
        "layers with experts": (trace.layer.tolist(), layers),
    }
    for name, (given, expected) in sizes.items():
        if given != expected:
            raise ValueError(
                f"{path} is the trace of another model: it has {given} as its {name}, this model "
                f"{expected}; {_NEXT}"
            )
    if not trace.tokens.sum():
        raise ValueError(f"{path} holds no routed token, so it says nothing of use; {_NEXT}")
