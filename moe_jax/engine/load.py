"""Loads a checkpoint into an engine."""

import importlib.resources
import os
import sys
from pathlib import Path
from typing import get_args, no_type_check

import jax

from host_offload.memory import (
    device_memory_bytes,
    host_memory_bytes,
    keep_freed_memory,
    parse_bytes,
)
from moe_jax.cache.paged_kv import PAGE_SIZE
from moe_jax.checkpoint import open_checkpoint
from moe_jax.checkpoint.chat import read_chat_template
from moe_jax.checkpoint.tokenizer import read_tokenizer, stop_tokens
from moe_jax.engine.arrays import ArrayReceiver
from moe_jax.engine.costs import MissingExperts, force, measure_costs
from moe_jax.engine.engine import Engine
from moe_jax.engine.mover import ExpertMover
from moe_jax.engine.plan import make_plan
from moe_jax.engine.runner import Runner
from moe_jax.engine.sizing import plan_for, read_dtype
from moe_jax.model.programs import Programs
from moe_jax.placement.memory_plan import MemoryPlan
from moe_jax.placement.planner import Planner, plan_layer
from moe_jax.placement.policies import Policy, policy_named

_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


@no_type_check  # checks its own arguments, with errors that a user can read
def load(
    path: str | Path | None = None,
    *,
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    dtype: str = "bfloat16",
    max_tokens: int = 4096,
    max_seqs: int = 8,
    missing_experts: MissingExperts = "auto",
    planner: Planner | None = None,
    residency: str | Policy | None = None,
    max_swaps: int | None = None,
    progress: bool | None = None,
) -> Engine:
    """Loads a model and decides what lives where.

    Args:
      path: a Hugging Face folder, or one written by `Engine.save`; None: the embedded model.
      device_memory: bytes, or text like "24GiB", that the model may use on the device; None: what
        the device reports. On the CPU backend it is a budget that is kept as if for a device.
      host_memory: the same for experts in pinned host memory; None: the machine's memory.
      dtype: "bfloat16" or "float32", of weights, activations and KV.
      max_tokens: the capacity of the KV cache, over all sequences that run together.
      max_seqs: how many sequences run together at most.
      missing_experts: how experts that are not on the device run: "auto" lets the planner choose
        per expert and step, "stream" always copies their weights over, "host" always computes
        them on the CPU.
      planner: what decides for the experts of one layer call, in place of
        `moe_jax.placement.planner.plan_layer`: a function of its arguments and result that jax can
        trace. It decides about time only: results do not depend on it.
      residency: the policy by which experts change places between steps, by name or as a
        `moe_jax.placement.policies.Policy`: "static" (they stay), "lru", "lfu", "lfru", "score" or
        "least_stale". A swap must pay for its transfer. None: "lfru", on the CPU backend "static",
        since there both sides are the same memory.
      max_swaps: how many experts may come to the device after one step; None: one for each layer.
      progress: whether to show bars; None: if standard error is a terminal.

    Raises ValueError for anything that cannot be loaded or does not fit, before weights are read.
    """
    weights_dtype = read_dtype(dtype)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sizes = {"max_tokens": (max_tokens, 1), "max_seqs": (max_seqs, 1)}
    if max_swaps is not None:
        sizes["max_swaps"] = max_swaps, 0
    for name, (value, least) in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if residency is None:
        residency = "static" if jax.default_backend() == "cpu" else "lfru"
    policy = policy_named(residency)
    if missing_experts not in get_args(MissingExperts):
        raise ValueError(
            f"missing_experts must be 'auto', 'stream' or 'host', got {missing_experts!r}"
        )
    progress = sys.stderr.isatty() if progress is None else progress
    folder = Path(reference_model_folder() if path is None else path)
    device_budget = device_memory_bytes() if device_memory is None else parse_bytes(device_memory)
    host_budget = host_memory_bytes() if host_memory is None else parse_bytes(host_memory)

    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    tokenizer = read_tokenizer(folder)
    template = read_chat_template(folder)
    ends = stop_tokens(folder)
    memory = plan_for(
        config,
        device_bytes=device_budget,
        host_bytes=host_budget,
        dtype=dtype,
        max_tokens=max_tokens,
        max_seqs=max_seqs,
    )
    _check_pinned_limit(memory)
    curves = force(measure_costs(config, weights_dtype, progress=progress), missing_experts)
    receiver = ArrayReceiver(config, memory, weights_dtype)
    checkpoint.load(weights_dtype, receiver.sharding, receiver.receive, progress)
    programs = Programs(config, memory.kv_pages, PAGE_SIZE, planner or plan_layer)
    runner = Runner(receiver.build(programs, curves), programs, memory.kv_pages)
    return Engine(
        runner,
        make_plan(config, memory, curves, jax.default_backend(), planner or plan_layer),
        ExpertMover(runner, policy, sum(config.moe_layers) if max_swaps is None else max_swaps),
        source=folder,
        tokenizer=tokenizer,
        template=template,
        stop_tokens=ends,
        max_tokens=max_tokens,
        max_seqs=max_seqs,
        progress=progress,
    )


def reference_model_folder() -> Path:
    """Where the embedded model lies."""
    return Path(str(importlib.resources.files("moe_jax") / "assets" / "reference_model"))


def _check_pinned_limit(memory: MemoryPlan) -> None:
    """XLA:GPU pins 64 GB at most unless told otherwise before it starts."""
    if jax.default_backend() != "gpu":
        return
    limit = int(os.environ.get(_PINNED_LIMIT, "64")) * 10**9
    needed = memory.host_experts * memory.expert_bytes
    if needed > limit:
        raise ValueError(
            f"{needed / 1e9:.0f} GB of experts go to pinned host memory, and XLA allows "
            f"{limit / 1e9:.0f} GB; set the environment variable {_PINNED_LIMIT} to at least "
            f"{needed // 10**9 + 1} before starting Python"
        )
