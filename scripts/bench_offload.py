"""Measures a model that does not fit: decode and prefill, planned and by simpler rules.

The ways take turns on one random checkpoint with one device budget: "plan" is this project's
planner, "fiddler" the published rule with costs measured here, "stream" and "host" force one way
for every expert that is not resident. Experts keep their places, so that all have the same ones.
Stops in time with --seconds, after at least one way.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from kernel_bench.report import offload_table, today, versions, write_json
from random_checkpoint import SHAPES, config_of, write_checkpoint

import moe_jax
from moe_jax.placement.rules import fiddler

WAYS: dict[str, dict[str, Any]] = {
    "plan": {},
    "host": {"missing_experts": "host"},
    "stream": {"missing_experts": "stream"},
    "fiddler": {"planner": fiddler},
}


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
    add("--decode", type=int, default=16, help="tokens per decode run (16)")
    add("--repeats", type=int, default=3, help="runs whose median counts (3)")
    add("--seconds", type=float, help="begin nothing more after this time")
    add("--out", type=Path, help="file for the JSON result")
    return parser.parse_args()


def measure_way(folder: Path, way: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loads the checkpoint and measures one way."""
    engine = moe_jax.load(
        folder,
        device_memory=arguments.device_memory,
        max_tokens=max(arguments.prefill) + arguments.decode + 16,
        max_seqs=1,
        residency="static",
        progress=False,
        **WAYS[way],
    )
    vocab = engine.config.vocab
    prompt = np.random.default_rng(1).integers(0, vocab, max(arguments.prefill)).tolist()

    def run(length: int, tokens: int) -> tuple[float, float]:
        before = engine.stats
        engine.generate(prompt[:length], max_tokens=tokens, ignore_eos=True)
        spent = engine.stats.since(before)
        return spent.prefill_seconds, spent.decode_seconds

    def median(length: int, tokens: int, phase: int) -> float:
        run(length, tokens)
        return statistics.median(run(length, tokens)[phase] for _ in range(arguments.repeats))

    decode = arguments.decode / median(16, arguments.decode + 1, 1)
    prefills = {length: length / median(length, 1, 0) for length in arguments.prefill}
    stats = engine.stats
    return {
        "way": way,
        "decode_tokens_per_second": decode,
        "predicted_tokens_per_second": engine.plan.tokens_per_second,
        "prefill_tokens_per_second": {str(n): rate for n, rate in prefills.items()},
        "decode_error": stats.decode_error,
        "prefill_error": stats.prefill_error,
        "slots": engine.plan.memory.slots,
        "stats": str(stats),
    }


def main() -> int:
    arguments = parse()
    start = time.monotonic()
    config = config_of(arguments.shape) | {"num_hidden_layers": arguments.layers}
    folder = Path(arguments.checkpoint)
    write_checkpoint(folder, config)
    if json.loads((folder / "config.json").read_text()) != config:
        print(f"{folder} holds another checkpoint; give another folder", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "date": today(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
        "command": " ".join(["python", *sys.argv]),
        "shape": arguments.shape,
        "layers": arguments.layers,
        "device_memory": arguments.device_memory,
        "rows": [],
        "skipped": [],
    }
    slowest = 0.0
    for way in arguments.ways:
        begun = time.monotonic()
        late = arguments.seconds and begun - start + slowest > arguments.seconds
        if result["rows"] and late:
            result["skipped"].append(way)
            print(f"{way}: skipped, the time is over", flush=True)
            continue
        result["rows"].append(measure_way(folder, way, arguments))
        slowest = max(slowest, time.monotonic() - begun)
        print(f"{way}: {result['rows'][-1]['stats']}", flush=True)
        if arguments.out:
            write_json(arguments.out, result)
    print(f"\n{offload_table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
