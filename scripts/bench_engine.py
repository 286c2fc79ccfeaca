"""Measures what running requests together gives: batching, beams, prefixes, drafts, and its cost.

Takes the embedded reference model and a random checkpoint in turn; prints a table and writes JSON.
Compilation is never timed: each side of a comparison runs once before it counts, then both take
turns.
"""

import argparse
import gc
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import command_line
from bench import describe_machine
from engine_bench.comparing import Row, Sizes
from engine_bench.measures import (
    beams,
    bookkeeping,
    chunked_prefill,
    concurrency,
    prompt_lookup,
    shared_prefix,
)
from kernel_bench.report import markdown_table, today, versions, write_json
from random_checkpoint import SHAPES, config_of, write_checkpoint

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for

Measure = Callable[[moe_jax.Engine, Sizes], list[Row]]
# What is measured, and in which engine: with every expert resident, with every expert on the
# host, or with as many seats as there are requests that the scheduler is tried with.
MEASURES: dict[str, tuple[str, Measure]] = {
    "concurrency": ("resident", concurrency),
    "prefill": ("resident", chunked_prefill),
    "prefix": ("resident", shared_prefix),
    "lookup": ("resident", prompt_lookup),
    "beams": ("host", beams),
    "scheduling": ("crowded", bookkeeping),
}
# Their targets are those of a model that is limited by memory.
ONLY_RANDOM = ("beams", "prefix")


def load(folder: Path | None, where: str, sizes: Sizes) -> moe_jax.Engine:
    """The engine of that kind; `folder` None: the embedded model."""
    seats = max(sizes.together, sizes.decoding + 1, *sizes.beams)
    tokens = 2 * (sizes.long_prompt + sizes.shared + seats * (sizes.prompt + sizes.tokens))
    if where == "crowded":
        seats = sizes.running
        tokens = sizes.running * 2 * (sizes.prompt + sizes.tokens)
    options: dict[str, Any] = {"max_seqs": seats, "max_tokens": tokens}
    if where == "host":
        there = folder or reference_model_folder()
        nothing = device_memory_for(there, experts=0.0, **options)
        options |= {"device_memory": nothing, "missing_experts": "host"}
    return moe_jax.load(folder, progress=False, **options)


def measure(
    models: dict[str, Path | None], names: list[str], sizes: Sizes
) -> list[tuple[str, Row]]:
    """Every measure of every model; an engine at a time is in memory."""
    rows: list[tuple[str, Row]] = []
    for model, folder in models.items():
        for where in ("resident", "host", "crowded"):
            due = [name for name in names if MEASURES[name][0] == where]
            # The scheduler is the same for every model.
            if not due or (where == "crowded" and model != next(iter(models))):
                continue
            engine = load(folder, where, sizes)
            for name in due:
                found = MEASURES[name][1](engine, sizes)
                if folder is None and name in ONLY_RANDOM:
                    found = [replace(row, target=None) for row in found]
                rows += [(model, row) for row in found]
                print(f"{model}: {rows[-1][1].measure}", file=sys.stderr, flush=True)
            del engine
            gc.collect()
    return rows


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = []
    for row in result["rows"]:
        measured = ", ".join(f"{name} {value:.3g}" for name, value in row["measured"].items())
        target = ""
        if row["target"] is not None:
            sign = ">=" if row["at_least"] else "<="
            target = f"{sign} {row['target']:g}: {'reached' if row['reached'] else 'missed'}"
        outcome = f"{row['result']:.3g} {row['unit']}"
        lines.append((row["measure"], row["model"], measured, outcome, target))
    head = f"{result['machine']}, jax {result['versions'].get('jax')}, {result['date']}\n\n"
    return head + markdown_table(("what", "model", "medians", "result", "target"), lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="mixtral_0.8b", help="of the random checkpoint")
    add("--checkpoint", default="bench_checkpoint", help="folder of it; made if it is not there")
    add("--models", nargs="+", choices=("reference", "random"), default=["reference", "random"])
    add("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    add("--repeats", type=int, default=Sizes.repeats, help="runs whose median counts (5)")
    add("--tokens", type=int, default=Sizes.tokens, help="new tokens of a request (64)")
    add("--shared", type=int, default=Sizes.shared, help="tokens of the shared beginning (1000)")
    add("--long-prompt", type=int, default=Sizes.long_prompt, help="tokens of the prompt (1024)")
    add("--running", type=int, default=Sizes.running, help="requests for the scheduler (64)")
    add("--out", type=Path, help="file for the JSON result")
    arguments = parser.parse_args()
    command_line.check_least(arguments, repeats=1, tokens=1, shared=1, long_prompt=1, running=1)
    sizes = Sizes(
        repeats=arguments.repeats,
        tokens=arguments.tokens,
        shared=arguments.shared,
        long_prompt=arguments.long_prompt,
        running=arguments.running,
    )
    models: dict[str, Path | None] = {}
    if "reference" in arguments.models:
        models["reference"] = None
    if "random" in arguments.models:
        folder = Path(arguments.checkpoint)
        write_checkpoint(folder, config_of(arguments.shape))
        models[arguments.shape] = folder
    rows = measure(models, arguments.measures, sizes)
    result = {
        "date": today(),
        "machine": describe_machine(),
        "versions": versions() | {"python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        "sizes": asdict(sizes),
        "rows": [{"model": model, **asdict(row), "reached": row.reached} for model, row in rows],
    }
    print(table(result))
    if arguments.out:
        write_json(arguments.out, result)


if __name__ == "__main__":
    command_line.run(main)
