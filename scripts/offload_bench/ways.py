"""The ways to run a model that does not fit, each measured in a process of its own.

Each yields what it has measured so far, line by line. Every function here imports what it needs
itself: jax and torch must not share a process.
"""

# ruff: noqa: PLC0415
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from offload_bench.task import Task, rate, warm_up

# In the order of what they say: the planner, the rules and the library it is compared with, then
# other forms of the planner.
WAYS = ("plan", "stream", "host", "fiddler", "transformers", "driven", "halves")
EXTRA = WAYS[5:]
ENGINE_WAYS = tuple(way for way in WAYS if way != "transformers")


def measure_engine(way: str, task: Task, device_memory: int) -> Iterator[dict[str, Any]]:
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
    engine = moe_jax.load(
        task.folder,
        device_memory=device_memory,
        max_tokens=task.max_tokens,
        max_seqs=task.max_seqs,
        residency="static",
        progress=False,
        **options,
    )

    def run(prompt: list[int], tokens: int, beams: int) -> tuple[float, float]:
        before = engine.stats
        engine.generate(prompt, max_tokens=tokens + 1, num_beams=beams, ignore_eos=True)
        spent = engine.stats.since(before)
        return spent.prefill_seconds, spent.decode_seconds

    rates: dict[str, float] = {}
    predicted: dict[str, float | None] = {}
    for line in task.lines:
        warm_up(line, task, run)
        before = engine.stats
        rates[line.name] = rate(line, task, run)
        spent = engine.stats.since(before)
        # Steps of one kind are alike, so that the rate was mispredicted as their time was.
        times = spent.decode_times if line.decode else spent.prefill_times
        ratio = times.measured / times.predicted if times.predicted else None
        predicted[line.name] = ratio and ratio * rates[line.name]
        stats = engine.stats
        yield {
            "way": way,
            "tokens_per_second": dict(rates),
            "predicted": dict(predicted),
            "predicted_at_load": engine.plan.tokens_per_second,
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


def measure_transformers(task: Task, device_memory: int, platform: str) -> Iterator[dict[str, Any]]:
    """Transformers in bfloat16; on a GPU accelerate keeps there what the budget holds.

    The budget is for weights alone there, while the engine's holds its cache and activations too.

    Raises RuntimeError where torch sees no GPU and jax does.
    """
    import torch
    import transformers

    from host_offload.memory import format_bytes, host_memory_bytes

    options: dict[str, Any] = {}
    on_gpu = platform == "gpu"
    if on_gpu:
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} sees no GPU, jax does")
        most = {0: device_memory, "cpu": host_memory_bytes()}
        options = {"device_map": "auto", "max_memory": most}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        task.folder, dtype=torch.bfloat16, **options
    ).eval()

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(prompt: list[int], tokens: int, beams: int) -> tuple[float, float]:
        ids = torch.tensor([prompt], device="cuda:0" if on_gpu else "cpu")
        with torch.inference_mode():
            if beams > 1:
                return search(ids, tokens, beams)
            start = clock()
            out = model(ids, use_cache=True, logits_to_keep=1)
            filled = clock()
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
            return filled - start, clock() - filled

    def search(ids: torch.Tensor, tokens: int, beams: int) -> tuple[float, float]:
        marks = [clock()]

        def mark(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            marks.append(clock())  # the first one comes when the prompt is there
            return scores

        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=beams,
            do_sample=False,
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,
            pad_token_id=0,
            logits_processor=transformers.LogitsProcessorList([mark]),
        )
        return marks[1] - marks[0], clock() - marks[1]

    where = "everything on the CPU"
    if on_gpu:
        placed: dict[Any, int] = {}
        for weight in model.parameters():
            placed[weight.device.type] = placed.get(weight.device.type, 0) + weight.nbytes
        # What accelerate fetches for each use has no device of its own: "meta".
        where = ", ".join(f"{format_bytes(size)} on {name}" for name, size in placed.items())
    packages = {name: metadata.version(name) for name in _packages(platform)}
    named = ", ".join(f"{name} {version}" for name, version in packages.items())
    rates: dict[str, float] = {}
    for line in task.lines:
        warm_up(line, task, run)
        rates[line.name] = rate(line, task, run)
        yield {
            "way": "transformers",
            "tokens_per_second": dict(rates),
            "predicted": {},
            "predicted_at_load": None,
            "decode_error": None,
            "prefill_error": None,
            "versions": packages,
            "stats": f"{named}; weights: {where}",
        }
