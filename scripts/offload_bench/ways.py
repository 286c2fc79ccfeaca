"""The ways to run a model that does not fit, each measured in a process of its own.

Every function here imports what it needs itself: jax and torch must not share a process.
"""

# ruff: noqa: PLC0415
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

ENGINE_WAYS = ("plan", "halves", "driven", "host", "stream", "fiddler")
WAYS = (*ENGINE_WAYS, "transformers")
PROMPT = 16  # tokens of a prompt that is then decoded


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every way does with the same tokens.

    Attributes:
      folder: the checkpoint.
      device_memory: the budget on the device.
      vocab: token ids of prompts are below it.
      prefill: lengths of prompts.
      decode: tokens of each sequence in a decode run.
      beams: how many sequences are decoded together, besides one alone.
      repeats: runs whose median counts.
    """

    folder: Path
    device_memory: str
    vocab: int
    prefill: tuple[int, ...]
    decode: int
    beams: tuple[int, ...]
    repeats: int

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random prompts, the same for every way."""
        return np.random.default_rng(1).integers(0, self.vocab, (count, length)).tolist()


# (prompts, tokens) -> seconds of prefill and of decoding so many tokens of each.
Run = Callable[[list[list[int]], int], tuple[float, float]]


def device() -> tuple[str, str]:
    """Platform and kind of jax's first device."""
    import jax

    first = jax.devices()[0]
    return first.platform, first.device_kind


def measure_engine(way: str, task: Task) -> dict[str, Any]:
    """The engine, planned or by a simpler rule. Experts keep their places."""
    import moe_jax
    from moe_jax.placement.rules import fiddler

    options: dict[str, Any] = {"share_prefixes": False}
    if way == "driven":
        options["executor"] = "driven"
    elif way == "halves":
        options["expert_pieces"] = 2
    elif way in ("host", "stream"):
        options["missing_experts"] = way
    elif way == "fiddler":
        options["planner"] = fiddler
    widest = max((1, *task.beams))
    engine = moe_jax.load(
        task.folder,
        device_memory=task.device_memory,
        max_tokens=max(max(task.prefill), widest * (PROMPT + task.decode)) + 16,
        max_seqs=widest,
        residency="static",
        progress=False,
        **options,
    )

    def run(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        before = engine.stats
        engine.generate(prompts, max_tokens=tokens + 1, ignore_eos=True)
        spent = engine.stats.since(before)
        return spent.prefill_seconds, spent.decode_seconds

    rates = _rates(task, run)
    stats = engine.stats
    return {
        "way": way,
        **rates,
        "predicted_tokens_per_second": engine.plan.tokens_per_second,
        "limit": engine.plan.limit,
        "decode_error": stats.decode_error,
        "prefill_error": stats.prefill_error,
        "decode_times": asdict(stats.decode_times),
        "prefill_times": asdict(stats.prefill_times),
        "slots": engine.plan.memory.slots,
        "stats": str(stats),
    }


def _packages(platform: str) -> list[str]:
    """What Transformers needs to run a model on this platform."""
    return ["torch", "transformers", *(["accelerate"] if platform == "gpu" else [])]


def why_not_transformers(platform: str) -> str | None:
    """Why Transformers cannot be measured beside an engine on this platform; None: it can."""
    if platform not in ("cpu", "gpu"):
        return f"the comparison is made on CPUs and GPUs, and jax runs on {platform}"
    missing = [name for name in _packages(platform) if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed; pip install {' '.join(missing)}"
    return None


def measure_transformers(task: Task, platform: str) -> dict[str, Any]:
    """Transformers in bfloat16; on a GPU accelerate keeps there what the budget holds.

    The budget is for weights alone there, while the engine's holds its cache and activations too.

    Raises RuntimeError where torch sees no GPU and jax does.
    """
    import torch
    import transformers

    from host_offload.memory import format_bytes, host_memory_bytes, parse_bytes

    options: dict[str, Any] = {}
    on_gpu = platform == "gpu"
    if on_gpu:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU, jax does")
        budget = parse_bytes(task.device_memory)
        options = {"device_map": "auto", "max_memory": {0: budget, "cpu": host_memory_bytes()}}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task.folder, dtype=torch.bfloat16, **options
    ).eval()

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        ids = torch.tensor(prompts, device="cuda:0" if on_gpu else "cpu")
        with torch.inference_mode():
            start = clock()
            out = model(ids, use_cache=True, logits_to_keep=1)
            filled = clock()
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            return filled - start, clock() - filled

    rates = _rates(task, run)
    where = "everything on the CPU"
    if on_gpu:
        placed: dict[Any, int] = {}
        for weight in model.parameters():
            placed[weight.device.type] = placed.get(weight.device.type, 0) + weight.nbytes
        # What accelerate fetches for each use has no device of its own: "meta".
        where = ", ".join(f"{format_bytes(size)} on {name}" for name, size in placed.items())
    packages = {name: metadata.version(name) for name in _packages(platform)}
    return {
        "way": "transformers",
        **rates,
        "predicted_tokens_per_second": None,
        "decode_error": None,
        "prefill_error": None,
        "versions": packages,
        "stats": f"{', '.join(f'{name} {v}' for name, v in packages.items())}; weights: {where}",
    }


def _rates(task: Task, run: Run) -> dict[str, Any]:
    """Tokens per second of one sequence, of several together, and of prompts."""

    def median(prompts: list[list[int]], tokens: int, phase: int) -> float:
        run(prompts, tokens)  # compiles
        return statistics.median(run(prompts, tokens)[phase] for _ in range(task.repeats))

    def decode(count: int) -> float:
        prompts = task.prompts(count, PROMPT)
        return count * task.decode / median(prompts, task.decode, 1)

    return {
        "decode_tokens_per_second": decode(1),
        "beams_tokens_per_second": {str(count): decode(count) for count in task.beams},
        "prefill_tokens_per_second": {
            str(length): length / median(task.prompts(1, length), 0, 0) for length in task.prefill
        },
    }
