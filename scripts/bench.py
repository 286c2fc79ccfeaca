"""Measures prefill and decode of a random checkpoint against this machine's limits.

Prints a table and writes JSON. With the golden extra installed, Transformers runs the same
checkpoint in a process of its own, alternating with the engine.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import command_line
import jax
import numpy as np
from engine_bench.comparing import alternate, medians
from ml_dtypes import bfloat16
from random_checkpoint import SHAPES, bytes_per_token, config_of, write_checkpoint

import moe_jax
from host_offload.calibrate import measure_product_rate, measure_read_rate
from host_offload.memory import format_bytes, parse_bytes
from host_offload.processor import processor_name
from moe_jax.engine.costs import calibrate
from moe_jax.engine.sizing import device_memory_for
from moe_jax.engine.stats import Stats, StepTimes

MOST_BY_NOISE = 1.05


class Ours:
    """The engine under test, with a share of its experts resident or as the arguments say."""

    def __init__(
        self,
        folder: Path,
        arguments: argparse.Namespace,
        resident: float | None = None,
        **options: Any,
    ):
        sizes = {"max_tokens": arguments.prefill + arguments.decode + 16, "max_seqs": 1}
        where: dict[str, Any] = {
            "device_memory": arguments.device_memory,
            "missing_experts": arguments.missing_experts,
        }
        if resident is not None:
            budget = device_memory_for(folder, experts=resident, **sizes)
            where = {"device_memory": budget, **options}
        self.engine = moe_jax.load(folder, share_prefixes=False, **where, **sizes)
        self.decode_times: list[StepTimes] = []

    def bytes_per_token(self, config: dict[str, Any]) -> int:
        """Weight bytes that one decoded token must read, experts being where they are."""
        memory = self.engine.plan.memory
        saved = memory.expert_bytes - memory.host_expert_bytes
        executed = config["num_experts_per_tok"] * config["num_hidden_layers"]
        return bytes_per_token(config) - executed * saved

    def prefill(self, prompt: list[int]) -> float:
        return self._run(prompt, 1).prefill_seconds

    def decode(self, prompt: list[int], tokens: int) -> float:
        spent = self._run(prompt, tokens + 1)
        self.decode_times.append(spent.decode_times)
        return spent.decode_seconds / tokens

    def _run(self, prompt: list[int], tokens: int) -> Stats:
        before = self.engine.stats
        self.engine.generate(prompt, max_tokens=tokens, ignore_eos=True)
        return self.engine.stats.since(before)

    @property
    def decode_run_error(self) -> float | None:
        """By which share of their time runs of decode steps were mispredicted, each as a whole.

        None if no step was predicted.
        """
        off = sum(abs(times.predicted - times.measured) for times in self.decode_times)
        measured = sum(times.measured for times in self.decode_times)
        return off / measured if measured else None


class Transformers:
    """The same checkpoint in Hugging Face Transformers, bfloat16 on the CPU.

    In a process of its own, which sleeps while the engine runs: the thread pools of torch and XLA
    slow each other down when they share a process.
    """

    def __init__(self, folder: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve_transformers, args=(other, str(folder)))
        self._process.start()
        self.version = self._pipe.recv()

    def prefill(self, prompt: list[int]) -> float:
        return self._run(prompt, 0)[0]

    def decode(self, prompt: list[int], tokens: int) -> float:
        return self._run(prompt, tokens)[1] / tokens

    def _run(self, prompt: list[int], tokens: int) -> tuple[float, float]:
        self._pipe.send((prompt, tokens))
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def serve_transformers(pipe: Any, folder: str) -> None:
    """Answers (prompt, tokens) with the seconds of prefill and decode, for ever."""
    import torch  # noqa: PLC0415 - optional: the golden extra
    import transformers  # noqa: PLC0415

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pipe.send(transformers.__version__)
    while True:
        try:
            prompt, tokens = pipe.recv()
        except EOFError:  # the benchmark has ended
            return
        with torch.inference_mode():
            start = time.perf_counter()
            out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            filled = time.perf_counter()
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        pipe.send((filled - start, time.perf_counter() - filled))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder = Path(arguments.checkpoint)
    config = config_of(arguments.shape)
    write_checkpoint(folder, config)
    needed = bytes_per_token(config)
    rng = np.random.default_rng(1)
    long = rng.integers(0, config["vocab_size"], arguments.prefill).tolist()
    short = long[:16]
    systems: dict[str, Any] = {"moe_jax": Ours(folder, arguments)}
    hosted = {"missing_experts": "host"}
    if arguments.int8:
        systems |= {
            "experts on host": Ours(folder, arguments, 0.0, **hosted),
            "experts on host, int8": Ours(folder, arguments, 0.0, **hosted, host_dtype="int8"),
        }
    if arguments.half:
        systems |= {
            "half on host, planned": Ours(folder, arguments, 0.5),
            "half on host, forced to run there": Ours(folder, arguments, 0.5, **hosted),
        }
    print(systems["moe_jax"].engine.plan, end="\n\n", flush=True)
    if not arguments.skip_transformers:
        systems["transformers"] = Transformers(folder)
    prefills = alternate(
        arguments.repeats,
        **{name: lambda s=s: s.prefill(long) for name, s in systems.items()},
        limit=lambda: measure_product_rate("bfloat16"),
    )
    decodes = alternate(
        arguments.repeats,
        **{name: lambda s=s: s.decode(short, arguments.decode) for name, s in systems.items()},
        limit=measure_read_rate,
    )
    version = None
    if "transformers" in systems:
        version = systems["transformers"].version
        systems["transformers"].close()
    prefill, decode = medians(prefills), medians(decodes)
    read_rate, product_rate = decode["limit"], prefill["limit"]
    # Two operations for each weight of two bytes; logits are wanted of the last token alone, and
    # moe_jax runs no other in the last layer.
    every_layer = needed - 2 * config["vocab_size"] * config["hidden_size"]
    all_but_one = every_layer * (1 - 1 / config["num_hidden_layers"])
    expert = calibrate(systems["moe_jax"].engine.config, np.dtype(bfloat16), recalibrate=True)
    expert_rate = expert.work_bytes / expert.host.seconds[0]
    stats = systems["moe_jax"].engine.stats
    rows = {}
    for name, own in systems.items():
        ours = isinstance(own, Ours)
        achieved = (own.bytes_per_token(config) if ours else needed) / decode[name]
        operations = arguments.prefill * (all_but_one if ours else every_layer)
        rows[name] = {
            "prefill_tokens_per_second": arguments.prefill / prefill[name],
            "share_of_product_limit": operations / prefill[name] / product_rate,
            "decode_tokens_per_second": 1 / decode[name],
            "decode_bytes_per_second": achieved,
            "share_of_read_limit": achieved / read_rate,
            "runs": {"prefill_seconds": prefills[name], "decode_seconds": decodes[name]},
        }
    return {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__}
        | ({"transformers": version} if version else {}),
        "command": " ".join(["python", *sys.argv]),
        "shape": arguments.shape,
        "bytes_per_token": needed,
        "read_bytes_per_second": read_rate,
        "product_operations_per_second": product_rate,
        "runs": {
            "read_bytes_per_second": decodes["limit"],
            "product_operations_per_second": prefills["limit"],
        },
        "experts_alone": {
            "bytes_per_second": expert_rate,
            "share_of_read_limit": expert_rate / expert.read_rate,
        },
        "rows": rows,
        "prediction_error": {"prefill": stats.prefill_error, "decode": stats.decode_error},
        "decode_run_prediction_error": systems["moe_jax"].decode_run_error,
        "stats": str(stats),
    }


def describe_machine() -> str:
    """Processor and core count, from the operating system."""
    return f"{processor_name()}, {os.cpu_count()} cores, backend {jax.default_backend()}"


def share(of_limit: float) -> str:
    """A share of the read limit as the table has it; one that cannot be says why it is."""
    why = ", above the limit: it was taken in a slower moment" if of_limit > MOST_BY_NOISE else ""
    return f"{of_limit:.0%}{why}"


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['shape']} on {result['machine']}, "
        f"jax {result['versions']['jax']}, {result['date']}",
        f"read limit {result['read_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{format_bytes(result['bytes_per_token'])} read per token; "
        f"products at {result['product_operations_per_second'] / 1e9:.0f} GFLOP/s",
        "",
        "| system | prefill tokens/s | of product limit | decode tokens/s | achieved GB/s "
        "| of read limit |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['prefill_tokens_per_second']:.0f} "
            f"| {row['share_of_product_limit']:.0%} "
            f"| {row['decode_tokens_per_second']:.1f} "
            f"| {row['decode_bytes_per_second'] / 1e9:.1f} "
            f"| {share(row['share_of_read_limit'])} |"
        )
    ours, theirs = result["rows"]["moe_jax"], result["rows"].get("transformers")
    if theirs:
        ratios = [
            f"{name} {ours[key] / theirs[key]:.2f} x transformers"
            for name, key in (
                ("prefill", "prefill_tokens_per_second"),
                ("decode", "decode_tokens_per_second"),
            )
        ]
        lines += ["", ", ".join(ratios)]
    if eight_bit := result["rows"].get("experts on host, int8"):
        plain = result["rows"]["experts on host"]
        key = "decode_tokens_per_second"
        lines += ["", f"int8 on the host: decode {eight_bit[key] / plain[key]:.2f} x bfloat16"]
    alone = result["experts_alone"]
    lines += [
        "",
        f"one expert alone, one token, on the host: {alone['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"{alone['share_of_read_limit']:.0%} of the read limit at that moment",
    ]
    errors = [
        f"{phase} {error:.1%}"
        for phase, error in result["prediction_error"].items()
        if error is not None
    ]
    if (together := result["decode_run_prediction_error"]) is not None:
        errors.append(f"all decode steps of a run together {together:.1%}")
    if errors:
        lines += ["", f"share of their time by which steps were mispredicted: {', '.join(errors)}"]
    return "\n".join(lines)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError for what would fail after a checkpoint was written, or minutes later."""
    command_line.check_least(arguments, prefill=1, decode=1, repeats=1)
    ways = ("auto", "stream", "host")
    if arguments.missing_experts not in ways:
        raise ValueError(
            f"--missing-experts is {arguments.missing_experts}; choose one of {', '.join(ways)}"
        )
    if arguments.device_memory is not None:
        parse_bytes(arguments.device_memory)
    if arguments.out:
        out = Path(arguments.out)
        if out.is_dir():
            raise ValueError(f"--out is {out}, a folder; choose a file in it")
        if not out.parent.is_dir():
            raise ValueError(f"--out is {out}, in no folder that exists; make it first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="mixtral_0.8b", help="of the random checkpoint")
    add("--checkpoint", default="bench_checkpoint", help="folder of it; made if it is not there")
    add("--out", help="file for the JSON result")
    add("--prefill", type=int, default=512, help="prompt tokens (512)")
    add("--decode", type=int, default=32, help="tokens per decode run (32)")
    add("--repeats", type=int, default=7, help="runs whose median counts (7)")
    add("--device-memory", help="device budget (default: everything fits)")
    add("--missing-experts", default="auto", help="auto, stream or host")
    add("--int8", action="store_true", help="also all experts on the host, in bfloat16 and int8")
    add("--half", action="store_true", help="also half of the experts on the host")
    add("--skip-transformers", action="store_true", help="measure only moe_jax")
    arguments = parser.parse_args()
    check(arguments)
    result = measure(arguments)
    print(table(result))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    command_line.run(main)
