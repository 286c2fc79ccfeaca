"""Measures a model that does not fit: decode, prefill and beams, planned and by simpler rules.

The ways take turns on one random checkpoint with one device budget and the same tokens: "plan" is
this project's planner, "stream" and "host" force one way for every expert that is not resident,
"fiddler" is the published rule with costs measured here, "driven" the planner with layers driven
from Python, "halves" with experts in two pieces; experts keep their places, so that all have the
same ones, but for "halves", which fills the budget a little better and counts slots in halves.
"transformers" is Hugging Face Transformers, on a GPU with accelerate's offload in the same budget,
else on the CPU; where it cannot run, the result says why. Each way is a process of its own. Every
number is printed and written as soon as it is there, and with --seconds the script stops in time.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import command_line
from kernel_bench.report import today, versions, write_json
from offload_bench.apart import Failure, run_apart
from offload_bench.machine import Device, allow_pinning, device
from offload_bench.sizes import WHOLE_BUDGET, Limits, Sizes, choose_budget, choose_layers
from offload_bench.table import TIME_IS_OVER, offload_table
from offload_bench.task import Task
from offload_bench.turns import Seen, take_turns
from offload_bench.ways import (
    ENGINE_WAYS,
    EXTRA,
    WAYS,
    measure_engine,
    measure_transformers,
    why_not_transformers,
)
from random_checkpoint import SHAPES, config_of, write_checkpoint

from host_offload.memory import format_bytes, host_memory_bytes, parse_bytes


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="mixtral_8x7b", help="of the random checkpoint")
    add("--layers", type=int, help="layers of it (as many as memory, disk and --seconds allow)")
    add("--checkpoint", required=True, help="folder of it; made if it is not there")
    add(
        "--device-memory",
        help="device budget (24GB, or what the device has; less where most would fit into that)",
    )
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what to measure, in order")
    add("--prefill", type=int, nargs="+", default=[512, 2048, 4096], help="prompt lengths")
    add("--decode", type=int, default=16, help="tokens of a decode run (16)")
    add("--beams", type=int, nargs="*", default=[4, 8, 16], help="beam widths (4 8 16)")
    add("--repeats", type=int, default=3, help="runs whose median counts (3; fewer of long ones)")
    add("--seconds", type=float, help="begin nothing more, and stop what runs, after this time")
    add("--out", type=Path, help="file for the JSON result")
    return parser.parse_args()


def measured_layers(
    arguments: argparse.Namespace, config: Mapping[str, Any], task: Task, found: Device
) -> tuple[int, str]:
    """How many layers to measure, and why so many."""
    if arguments.layers is not None:
        if arguments.layers < 1:
            raise ValueError(f"--layers must be at least 1, got {arguments.layers}")
        return arguments.layers, "as asked for"
    there = task.folder / "config.json"
    if there.exists():
        return json.loads(there.read_text())["num_hidden_layers"], "the checkpoint that is there"
    on_host = found.platform == "cpu"
    budget = arguments.device_memory or min(found.bytes, WHOLE_BUDGET)
    limits = Limits(
        host_bytes=host_memory_bytes(),
        device_bytes=0 if on_host else parse_bytes(budget),
        disk_bytes=shutil.disk_usage(_existing(task.folder)).free,
        seconds=arguments.seconds,
    )
    # The other forms of the planner are measured if there is time.
    ways = [way for way in arguments.ways if way not in EXTRA]
    sizes = Sizes.of(config)
    return choose_layers(sizes, limits, max(len(ways), 1), task.lines, arguments.repeats)


def _existing(folder: Path) -> Path:
    return next(parent for parent in folder.absolute().parents if parent.exists())


def measure_way(
    way: str, task: Task, budget: int, platform: str, seconds: float | None, seen: Seen
) -> None:
    """Measures one way; `seen` gets it line by line. Raises Failure if not all of it came."""
    if way != "transformers":
        run_apart(measure_engine, way, task, budget, seconds=seconds, seen=seen)
    elif reason := why_not_transformers(platform):
        raise Failure(reason)
    else:
        run_apart(measure_transformers, task, budget, platform, seconds=seconds, seen=seen)


def main() -> int:
    arguments = parse()
    end = math.inf if arguments.seconds is None else time.monotonic() + arguments.seconds
    config = config_of(arguments.shape)
    whole = config["num_hidden_layers"]
    task = Task(
        folder=Path(arguments.checkpoint),
        vocab=config["vocab_size"],
        prefill=tuple(arguments.prefill),
        decode=arguments.decode,
        beams=tuple(arguments.beams),
        repeats=arguments.repeats,
    )
    found: Device = run_apart(device)
    if found.platform == "gpu":
        allow_pinning()
    try:
        budget = parse_bytes(arguments.device_memory) if arguments.device_memory else None
        layers, why_layers = measured_layers(arguments, config, task, found)
        config["num_hidden_layers"] = layers
        print(f"{arguments.shape}, {layers} of {whole} layers: {why_layers}", flush=True)
        write_checkpoint(task.folder, config)
        if json.loads((task.folder / "config.json").read_text()) != config:
            raise ValueError(f"{task.folder} holds another checkpoint; give another folder")
        why_budget = "as asked for"
        if budget is None:
            budget, why_budget = choose_budget(config, whole, task, found.bytes)
    except ValueError as error:
        print(f"bench_offload.py: {error}", file=sys.stderr)
        return 2
    print(f"{format_bytes(budget)} on the device: {why_budget}", flush=True)
    result: dict[str, Any] = {
        "date": today(),
        "device": found.kind,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "shape": arguments.shape,
        "layers": layers,
        "whole_layers": whole,
        "layers_chosen_by": why_layers,
        "device_memory": format_bytes(budget),
        "budget_chosen_by": why_budget,
        "ways": arguments.ways,
        "lines": [line.name for line in task.lines],
        "rows": [],
        "not_measured": [],
    }

    def measure(way: str, seconds: float | None, seen: Seen) -> None:
        measure_way(way, task, budget, found.platform, seconds, seen)

    def write() -> None:
        if arguments.out:
            write_json(arguments.out, result)

    write()
    take_turns(arguments.ways, EXTRA, measure, end, result, write)
    print(f"\n{offload_table(result)}")
    # Time may run out, and packages may be missing; an engine that fails is something else.
    broken = [
        entry["way"]
        for entry in result["not_measured"]
        if entry["way"] in ENGINE_WAYS and TIME_IS_OVER not in entry["reason"]
    ]
    return 1 if broken or not result["rows"] else 0


if __name__ == "__main__":
    command_line.run(main)
