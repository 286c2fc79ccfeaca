"""How much memory a checkpoint needs, before any weight is read."""

from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import expected_targets, open_checkpoint
from moe_jax.config import ModelConfig
from moe_jax.engine.batch import PREFILL_BUCKETS
from moe_jax.model.int8 import int8_bytes
from moe_jax.placement.memory_plan import MemoryPlan, plan_memory

_DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def read_dtype(name: str) -> np.dtype:
    """The dtype of that name; ValueError for any but "bfloat16" and "float32"."""
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {sorted(_DTYPES)}, got {name!r}")
    return np.dtype(_DTYPES[name])


def plan_for(
    config: ModelConfig,
    *,
    device_bytes: int,
    host_bytes: int,
    dtype: str,
    host_dtype: str | None = None,
    max_tokens: int | None,
    max_seqs: int,
) -> MemoryPlan:
    """The memory plan of an engine with these options; raises ValueError where it cannot fit."""
    itemsize = read_dtype(dtype).itemsize
    dense = [shape for name, shape in expected_targets(config).items() if ".experts." not in name]
    return plan_memory(
        config,
        itemsize=itemsize,
        host_expert_bytes=int8_bytes(config.expert_shapes) if host_dtype == "int8" else None,
        dense_bytes=sum(int(np.prod(shape)) for shape in dense) * itemsize,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        max_tokens=max_tokens,
        max_seqs=max_seqs,
        largest_step=PREFILL_BUCKETS[-1],
    )


def device_memory_for(
    path: str | Path,
    *,
    experts: float,
    dtype: str = "bfloat16",
    max_tokens: int = 4096,
    max_seqs: int = 8,
    expert_pieces: int = 1,
) -> int:
    """The `device_memory` in bytes with which `load` keeps this share of the experts resident.

    `experts` lies between 0 (none) and 1 (all); the number of resident experts is rounded down.
    """
    if not 0 <= experts <= 1:
        raise ValueError(f"experts is a share between 0 and 1, got {experts!r}")
    config = open_checkpoint(path).config
    config = replace(config, moe=config.moe.cut(expert_pieces))
    unlimited = 1 << 62
    options = {"dtype": dtype, "max_tokens": max_tokens, "max_seqs": max_seqs}
    whole = plan_for(config, device_bytes=unlimited, host_bytes=unlimited, **options)
    if experts == 1:
        return whole.device_bytes_used
    resident = int(experts * sum(whole.experts))
    # While experts are in transit, two of them have room in the workspace.
    fixed = whole.device_bytes_used - (sum(whole.experts) - 2) * whole.expert_bytes
    return fixed + resident * whole.expert_bytes
