"""Measures a model that does not fit: decode, beams and prefill, planned and by simpler rules.

The ways take turns on one random checkpoint with one device budget and the same tokens: "plan" is
this project's planner, "halves" the same with experts in two pieces, "driven" with layers driven
from Python, "fiddler" the published rule with costs measured here, "stream" and "host" force one
way for every expert that is not resident; experts keep their places, so that all have the same
ones, but for "halves", which fills the budget a little better and counts slots in halves.
"transformers" is Hugging Face Transformers, on a GPU with accelerate's offload in the same budget,
else on the CPU; where it cannot run, the result says why. Each way is a process of its own. Stops
in time with --seconds, after at least one way.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from kernel_bench.report import offload_table, today, versions, write_json
from offload_bench.apart import Failure, run_apart
from offload_bench.ways import (
    ENGINE_WAYS,
    WAYS,
    Task,
    device,
    measure_engine,
    measure_transformers,
    why_not_transformers,
)
from random_checkpoint import SHAPES, config_of, write_checkpoint


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="mixtral_8x7b", help="of the random checkpoint")
    add("--layers", type=int, default=4, help="layers of it (4)")
    add("--checkpoint", required=True, help="folder of it; made if it is not there")
    add(
        "--device-memory", default="4GB", help="device budget (4GB: to 4 layers what 24GB is to 32)"
    )
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--prefill", type=int, nargs="+", default=[512, 2048, 4096], help="prompt lengths")
    add("--decode", type=int, default=16, help="tokens of each sequence in a decode run (16)")
    add(
        "--beams",
        type=int,
        nargs="*",
        default=[4, 8, 16],
        help="sequences decoded together, besides one alone (4 8 16)",
    )
    add("--repeats", type=int, default=3, help="runs whose median counts (3)")
    add("--seconds", type=float, help="begin nothing more, and stop what runs, after this time")
    add("--out", type=Path, help="file for the JSON result")
    return parser.parse_args()


def measure_way(way: str, task: Task, platform: str, seconds: float | None) -> dict[str, Any]:
    """Measures one way. Raises Failure if it gave no result."""
    if way != "transformers":
        return run_apart(measure_engine, way, task, seconds=seconds)
    if reason := why_not_transformers(platform):
        raise Failure(reason)
    return run_apart(measure_transformers, task, platform, seconds=seconds)


def measure_ways(
    arguments: argparse.Namespace, task: Task, platform: str, result: dict[str, Any], start: float
) -> None:
    """Fills the result way by way, and writes it after each."""
    slowest = 0.0
    for way in arguments.ways:
        begun = time.monotonic()
        left = None
        # The first result may take as long as it needs.
        if arguments.seconds and result["rows"]:
            left = arguments.seconds - (begun - start)
        try:
            if left is not None and left < slowest:
                raise Failure("not begun, the time is over")
            result["rows"].append(measure_way(way, task, platform, left))
            slowest = max(slowest, time.monotonic() - begun)
            print(f"{way}: {result['rows'][-1]['stats']}", flush=True)
        except Failure as failure:
            result["not_measured"].append({"way": way, "reason": str(failure)})
            print(f"{way}: not measured: {failure}", flush=True)
        if arguments.out:
            write_json(arguments.out, result)


def main() -> int:
    arguments = parse()
    start = time.monotonic()
    config = config_of(arguments.shape) | {"num_hidden_layers": arguments.layers}
    folder = Path(arguments.checkpoint)
    write_checkpoint(folder, config)
    if json.loads((folder / "config.json").read_text()) != config:
        print(f"{folder} holds another checkpoint; give another folder", file=sys.stderr)
        return 2
    platform, kind = run_apart(device)
    task = Task(
        folder=folder,
        device_memory=arguments.device_memory,
        vocab=config["vocab_size"],
        prefill=tuple(arguments.prefill),
        decode=arguments.decode,
        beams=tuple(arguments.beams),
        repeats=arguments.repeats,
    )
    result: dict[str, Any] = {
        "date": today(),
        "device": kind,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "shape": arguments.shape,
        "layers": arguments.layers,
        "device_memory": arguments.device_memory,
        "rows": [],
        "not_measured": [],
    }
    measure_ways(arguments, task, platform, result, start)
    print(f"\n{offload_table(result)}")
    # Time may run out, and packages may be missing; an engine that fails is something else.
    broken = [
        entry["way"]
        for entry in result["not_measured"]
        if entry["way"] in ENGINE_WAYS and "the time is over" not in entry["reason"]
    ]
    return 1 if broken or not result["rows"] else 0


if __name__ == "__main__":
    sys.exit(main())
