"""Loads a checkpoint into an engine."""

import hashlib
import importlib.resources
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, no_type_check

import jax

from host_offload.memory import (
    device_memory_bytes,
    host_device,
    host_memory_bytes,
    keep_freed_memory,
    parse_bytes,
)
from host_offload.processor import describe_processor
from moe_jax.cache.paged_kv import PAGE_SIZE
from moe_jax.checkpoint import open_checkpoint
from moe_jax.checkpoint.chat import read_chat_template
from moe_jax.checkpoint.tokenizer import read_tokenizer, stop_tokens
from moe_jax.engine.arrays import ArrayReceiver
from moe_jax.engine.costs import measure_costs
from moe_jax.engine.engine import Engine
from moe_jax.engine.initial_placement import place_experts
from moe_jax.engine.limits import check_limits
from moe_jax.engine.loop import EngineLoop
from moe_jax.engine.monitor import Monitor
from moe_jax.engine.mover import ExpertMover
from moe_jax.engine.observer import StepObserver
from moe_jax.engine.plan import make_plan
from moe_jax.engine.runner import Runner
from moe_jax.engine.sampler import Sampler
from moe_jax.engine.seating import Seating
from moe_jax.engine.sizing import plan_for, read_dtype
from moe_jax.model.programs import Executor, Programs
from moe_jax.placement.forced import (
    MissingExperts,
    check_planner,
    force_planner,
    streaming_can_pay,
)
from moe_jax.placement.planner import Planner, plan_layer
from moe_jax.placement.policies import Policy, policy_named


@no_type_check  # checks its own arguments, with errors that a user can read
def load(
    path: str | Path | None = None,
    *,
    device_memory: str | int | None = None,
    host_memory: str | int | None = None,
    dtype: str = "bfloat16",
    host_dtype: Literal["int8"] | None = None,
    max_tokens: int | None = 4096,
    max_seqs: int = 8,
    share_prefixes: bool = True,
    expected_share: float = 1.0,
    missing_experts: MissingExperts = "auto",
    expert_pieces: int = 1,
    planner: Planner | None = None,
    residency: str | Policy | None = None,
    max_swaps: int | None = None,
    placement: str | Path = "uniform",
    executor: Executor = "compiled",
    prefetch: bool | None = None,
    progress: bool | None = None,
) -> Engine:
    """Loads a model and decides what lives where.

    Args:
      path: a Hugging Face folder, or one written by `Engine.save`; None: the embedded model.
      device_memory: bytes, or text like "24GiB", that the model may use on the device; None: what
        the device reports. On the CPU backend it is a budget that is kept as if for a device.
      host_memory: the same for experts in pinned host memory; None: what this process may use.
      dtype: "bfloat16" or "float32", of weights, activations and KV.
      host_dtype: "int8" keeps the experts that are not on the device in 8 bits, at half the bytes:
        faster wherever memory or link are the limit, and an approximation, in contrast to all
        else: results then depend on which experts are on the device. They keep their places. None:
        `dtype`.
      max_tokens: the capacity of the KV cache, over all sequences that run together; None: what
        weights and workspace leave of the device's memory, at least 4096.
      max_seqs: how many sequences run together at most; each beam is one.
      share_prefixes: whether requests that begin alike share the KV pages of their beginnings, also
        with requests that have ended; benchmarks of prefill want it off.
      expected_share: the share of its max_tokens that a request is expected to use. With 1, it
        starts when the KV cache is sure to suffice. With less, more run together; where they turn
        out longer, the last of them is put back and computed again later, with the same tokens.
      missing_experts: how experts that are not on the device run: "auto" lets the planner choose
        per expert and step, "stream" always copies their weights over, "host" always computes
        them on the CPU. Where streaming can never pay, as on the CPU backend, "auto" is "host".
      expert_pieces: how many equal parts along ffn each expert is kept in. With 2, half of an
        expert can be streamed while the host computes the other half, which helps where only two
        or three experts of a layer miss. Each piece gets the tokens of its expert, which takes
        workspace, and a transfer of its own. In float32 results are the same but for the order of
        sums, otherwise also but for rounding; where pieces are matters no more than where whole
        experts are. Plan and stats count pieces.
      planner: what decides for the experts of one layer call, in place of
        `moe_jax.placement.planner.plan_layer`: a function of its arguments and result that jax can
        trace. It decides about time only: results do not depend on it.
      residency: the policy by which experts change places between steps, by name or as a
        `moe_jax.placement.policies.Policy`: "static" (they stay), "lru", "lfu", "lfru", "score" or
        "least_stale". A swap must pay for its transfer. None: "lfru", on the CPU backend "static",
        since there both sides are the same memory.
      max_swaps: how many whole experts may come to the device after one step; None: one for each
        layer.
      placement: which experts are on the device at first: "uniform", or the path of a routing
        trace made by scripts/profile_experts.py, whose most used experts of each layer they are.
      executor: how layers with experts in host memory run: "compiled", as one device program that
        calls the host, or "driven", as several that Python starts, of which one runs on the host.
        Results do not depend on it.
      prefetch: whether driven layers guess which expert the next layer will miss and bring it over
        while the link is idle; it stops by itself where guesses are wrong. None: with the executor
        "driven", but not on the CPU backend, whose link is its own memory.
      progress: whether to show bars; None: if standard error is a terminal.

    Raises ValueError for anything that cannot be loaded or does not fit, before weights are read.
    """
    weights_dtype = read_dtype(dtype)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    sizes = {"max_seqs": (max_seqs, 1)}
    if max_tokens is not None:
        sizes["max_tokens"] = max_tokens, 1
    if max_swaps is not None:
        sizes["max_swaps"] = max_swaps, 0
    sizes["expert_pieces"] = expert_pieces, 1
    for name, (value, least) in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if not isinstance(expected_share, int | float) or not 0 <= expected_share <= 1:
        raise ValueError(f"expected_share must be a number from 0 to 1, got {expected_share!r}")
    if host_dtype not in (None, "int8"):
        raise ValueError(f"host_dtype must be None or 'int8', got {host_dtype!r}")
    if residency is None:
        still = jax.default_backend() == "cpu" or host_dtype is not None
        residency = "static" if still else "lfru"
    policy = policy_named(residency)
    if policy.moves and host_dtype is not None:
        raise ValueError(
            f"experts kept in {host_dtype} on the host cannot change places with those on the "
            f"device, got residency={residency!r}; give residency='static' or no host_dtype="
        )
    if missing_experts not in get_args(MissingExperts):
        raise ValueError(
            f"missing_experts must be 'auto', 'stream' or 'host', got {missing_experts!r}"
        )
    if executor not in get_args(Executor):
        raise ValueError(f"executor must be 'compiled' or 'driven', got {executor!r}")
    if prefetch and executor != "driven":
        raise ValueError(
            f"prefetch=True needs executor='driven', got {executor!r}: a compiled layer cannot "
            "start a transfer for the next one"
        )
    if prefetch and missing_experts == "host":
        raise ValueError(
            "prefetch=True brings experts to the device, and missing_experts='host' computes them "
            "where they are; leave out one of the two"
        )
    if prefetch is None:
        brings = executor == "driven" and missing_experts != "host"
        prefetch = brings and jax.default_backend() != "cpu"
    host = host_device() if executor == "driven" else None
    progress = sys.stderr.isatty() if progress is None else progress
    folder = Path(reference_model_folder() if path is None else path)
    device_budget = device_memory_bytes() if device_memory is None else parse_bytes(device_memory)
    host_budget = host_memory_bytes() if host_memory is None else parse_bytes(host_memory)

    checkpoint = open_checkpoint(folder)
    config = replace(checkpoint.config, moe=checkpoint.config.moe.cut(expert_pieces))
    tokenizer = read_tokenizer(folder)
    template = read_chat_template(folder)
    ends = stop_tokens(folder)
    memory = plan_for(
        config,
        device_bytes=device_budget,
        host_bytes=host_budget,
        dtype=dtype,
        host_dtype=host_dtype,
        max_tokens=max_tokens,
        max_seqs=max_seqs,
    )
    placed = place_experts(placement, config, memory)
    check_limits(memory.device_bytes_used, memory.host_bytes_used, driven=host is not None)
    curves = measure_costs(
        config, weights_dtype, host_dtype, driven=executor == "driven", progress=progress
    )
    if planner is not None:
        check_planner(planner, config.moe.num_experts, curves)
    elif missing_experts == "auto" and not streaming_can_pay(curves):
        missing_experts = "host"  # so that no program has to be ready for what it never does
    planner = force_planner(planner or plan_layer, missing_experts)
    receiver = ArrayReceiver(config, placed.slot_expert, weights_dtype, host_dtype, host)
    checkpoint.load(weights_dtype, receiver.sharding, receiver.receive, progress)
    programs = Programs(
        config,
        memory.kv_pages,
        PAGE_SIZE,
        planner,
        executor,
        prefetch,
        streams=missing_experts != "host",
    )
    model = receiver.build(programs, curves)
    # What experts the tokens of prompts use is what a policy begins with.
    runner = Runner(model, programs, memory.kv_pages, max_seqs, whole_prompts=policy.moves)
    plan = make_plan(
        config, memory, placed, curves, f"{jax.default_backend()} ({describe_processor()})", planner
    )
    most = expert_pieces * (sum(config.moe_layers) if max_swaps is None else max_swaps)
    if expert_pieces > 1:
        policy = replace(policy, gate_top=policy.gate_top * expert_pieces)
    observer = StepObserver(runner, Monitor(memory, curves), ExpertMover(runner, policy, most))
    identity = hashlib.sha256(repr((config, dtype)).encode()).digest()
    seating = Seating(
        pages=memory.kv_pages,
        rows=max_seqs,
        expected_share=expected_share,
        identity=identity if share_prefixes else None,
    )
    sampler = Sampler(config.vocab, max_seqs + 1)  # the rows of the seating
    return Engine(
        # A driven layer is started step by step, in Python: started ahead, it would be waited for.
        EngineLoop(runner, seating, sampler, observer, look_ahead=executor == "compiled"),
        observer,
        plan,
        config=checkpoint.config,
        source=folder,
        tokenizer=tokenizer,
        template=template,
        stop_tokens=ends,
        max_tokens=memory.max_tokens,
        max_seqs=max_seqs,
        progress=progress,
    )


def reference_model_folder() -> Path:
    """Where the embedded model lies."""
    return Path(str(importlib.resources.files("moe_jax") / "assets" / "reference_model"))
