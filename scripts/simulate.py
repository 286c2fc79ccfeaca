"""Replays routing traces on machines that are not there, and prints how good each way would be.

For every machine, model shape and trace: this project's planner under every residency policy, and
other planners (Fiddler's rule, stream everything, host everything) with static residents. Times are
those of the experts alone. "bound": no schedule beats it with the same residents, however experts
are cut. "oracle": that bound with Belady's residents. "cache": hits of the policy if every miss
entered for free; "hits": with swaps that pay back only. "pieces": missing experts are cut along ffn
into so many, each of which is streamed or runs on the host.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import command_line

from moe_jax.placement.caches import cache_residents, hit_rate
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.machines import MACHINES, Machine, curves_for, expert_bytes, machine_named
from moe_jax.placement.pieces import Pieces
from moe_jax.placement.planner import plan_layer
from moe_jax.placement.policies import POLICIES, policy_named
from moe_jax.placement.residency import profile_placement
from moe_jax.placement.rules import fiddler, host_all, stream_all
from moe_jax.placement.simulate import (
    Simulation,
    find_oracle,
    simulate,
    uniform_slots,
)
from moe_jax.placement.trace import RoutingTrace, load_trace, uniform_trace, zipf_trace

PLANNERS = {"plan": plan_layer, "fiddler": fiddler, "stream": stream_all, "host": host_all}
ITEMSIZE = 2  # bfloat16
MADE_UP = {"zipf": zipf_trace, "uniform": uniform_trace}
LABELS = ("machine", "model", "trace", "policy")
HINDSIGHT = "static, hindsight"  # residents are those that turn out busiest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model matters here; `dense` counts the parameters outside routed experts."""

    layers: int
    experts: int
    experts_per_token: int
    embed: int
    ffn: int
    dense: float

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.experts} experts"


MODELS = {
    "mixtral-8x7b": Shape(
        layers=32, experts=8, experts_per_token=2, embed=4096, ffn=14336, dense=1.6e9
    ),
    "qwen3-30b-a3b": Shape(
        layers=48, experts=128, experts_per_token=8, embed=2048, ffn=768, dense=1.54e9
    ),
    "olmoe-1b-7b": Shape(
        layers=16, experts=64, experts_per_token=8, embed=2048, ffn=1024, dense=0.48e9
    ),
}
# OLMoE fits whole into the default device memory, where all ways are alike.
DEFAULT_MODELS = ["mixtral-8x7b", "qwen3-30b-a3b"]
LEAST = {"steps": 1, "sequences": 1, "prompt": 0, "reserve_gb": 0, "most_per_step": 0, "seed": 0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--machines", nargs="+", default=list(MACHINES), metavar="NAME", help=f"{[*MACHINES]}")
    models = dict(choices=MODELS, help=f"{[*MODELS]} ({' '.join(DEFAULT_MODELS)})")
    add("--models", nargs="+", default=DEFAULT_MODELS, metavar="NAME", **models)
    add("--policies", nargs="+", default=list(POLICIES), metavar="NAME", help=f"{[*POLICIES]}")
    add("--trace", nargs="+", default=[], metavar="FILE", help="recorded traces of the models")
    add("--pieces", nargs="+", type=int, default=[1], help="of a missing expert, for the plan (1)")
    add("--every-pair", action="store_true", help="other planners under every policy too")
    add("--steps", type=int, default=100, help="decoding steps of made-up traces")
    add("--sequences", type=int, default=1, help="sequences decoded at a time")
    add("--prompt", type=int, default=512, help="tokens of a prompt that comes first; 0: none")
    add("--locality", type=float, default=0.5, help="how slowly a sequence changes its experts")
    add("--device-gb", type=float, default=24.0, help="device memory; a smaller device has less")
    add("--reserve-gb", type=float, default=2.0, help="of it for KV cache and activations")
    add("--most-per-step", type=int, help="most swaps after a step (default: one per layer)")
    text = "swap as an executor could that uploads beside steps, and keeps what was streamed"
    add("--overlap-uploads", action="store_true", help=text)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="JSON file for the results")
    arguments = parser.parse_args()
    try:
        check_numbers(arguments)
        for policy in arguments.policies:
            policy_named(policy)
        for machine in arguments.machines:
            machine_named(machine)
        for model, pieces in itertools.product(arguments.models, arguments.pieces):
            curves_of(MACHINES["h200"], MODELS[model], pieces)
        check_names(arguments.trace)
        arguments.recorded = {Path(path).stem: load_trace(path) for path in arguments.trace}
        for name, trace in arguments.recorded.items():
            check_experts(name, trace, arguments.models)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return arguments


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raises ValueError for an option that is out of range, or NaN."""
    command_line.check_least(arguments, **LEAST)
    if not 0 <= arguments.locality <= 1:
        raise ValueError(f"--locality is {arguments.locality}; choose a probability, 0 to 1")
    if not arguments.device_gb > 0:
        raise ValueError(f"--device-gb is {arguments.device_gb}; choose more than 0")


def check_names(paths: list[str]) -> None:
    """Raises ValueError if two traces would have one name in the table."""
    named: dict[str, str] = {}
    for path in paths:
        name = Path(path).stem
        if name in MADE_UP:
            raise ValueError(f"the trace {path} is called {name} as a made-up one is; rename it")
        if name in named:
            both = f"{named[name]} and {path}"
            raise ValueError(f"the traces {both} are both called {name}; rename one")
        named[name] = path


def check_experts(name: str, trace: RoutingTrace, models: list[str]) -> None:
    """Raises ValueError if none of these models has the trace's number of experts."""
    if any(MODELS[model].experts == trace.experts for model in models):
        return
    counts = ", ".join(f"{shape.experts} ({model})" for model, shape in MODELS.items())
    fitting = [model for model, shape in MODELS.items() if shape.experts == trace.experts]
    raise ValueError(
        f"the trace {name} has {trace.experts} experts per layer, none of --models does; there are "
        f"{counts}; "
        + (f"name {' or '.join(fitting)} in --models" if fitting else "record one of such a model")
    )


def traces(shape: Shape, arguments: argparse.Namespace) -> dict[str, RoutingTrace]:
    """The traces for a model's shape, by name: recorded ones need the same number of experts."""
    sizes = dict(
        steps=arguments.steps,
        layers=shape.layers,
        experts=shape.experts,
        experts_per_token=shape.experts_per_token,
        tokens=arguments.sequences,
        prompt=arguments.prompt,
        seed=arguments.seed,
        locality=arguments.locality,
    )
    found = {name: make(**sizes) for name, make in MADE_UP.items()}
    fitting = {n: t for n, t in arguments.recorded.items() if t.experts == shape.experts}
    return found | fitting


def slots_for(
    shape: Shape, trace: RoutingTrace, machine: Machine, arguments: argparse.Namespace
) -> tuple[int, ...]:
    """Slots that fit beside dense weights, what is reserved, and two experts in transit.

    A trace with fewer layers than the model gets the slots of as many layers.
    """
    size = expert_bytes(shape.embed, shape.ffn, ITEMSIZE)
    device = min(machine.device_bytes, arguments.device_gb * 1e9)
    left = device - shape.dense * ITEMSIZE - arguments.reserve_gb * 1e9 - 2 * size
    if left < 0:
        raise SystemExit(
            f"{machine.name} has {device / 1e9:.1f} GB for {shape}, {-left / 1e9:.1f} GB short; "
            "raise --device-gb, lower --reserve-gb, or leave it out"
        )
    total = int(left // size) * trace.layers // shape.layers
    return uniform_slots(total, trace.layers, shape.experts)


def curves_of(machine: Machine, shape: Shape, pieces: int = 1) -> CostCurves:
    """The costs of one of a model's experts, or of one piece of it."""
    return curves_for(machine, shape.embed, shape.ffn, ITEMSIZE, pieces)


def runs(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, str | int], float, Simulation]]:
    """Labels, hit rate of the plain cache, and result of every combination."""
    for model in arguments.models:
        shape = MODELS[model]
        size, counts = expert_bytes(shape.embed, shape.ffn, ITEMSIZE), {1, *arguments.pieces}
        for trace_name, trace in traces(shape, arguments).items():
            for machine_name in arguments.machines:
                machine = machine_named(machine_name)
                curves = curves_of(machine, shape)
                slots = slots_for(shape, trace, machine, arguments)
                cuts = {n: Pieces(count=n, curves=curves_of(machine, shape, n)) for n in counts}
                profile = profile_placement(trace.counts.sum(0, dtype="int64"), slots)
                most = arguments.most_per_step
                common = dict(
                    expert_bytes=size,
                    most_per_step=trace.layers if most is None else most,
                    overlap_uploads=arguments.overlap_uploads,
                    oracle=find_oracle(trace, curves, slots),
                )
                for planner, policy, count in ways(arguments):
                    labels: dict[str, str | int] = dict(
                        machine=machine_name,
                        model=model,
                        trace=trace_name,
                        planner=planner,
                        pieces=count,
                        policy=policy,
                    )
                    initial = profile if policy == HINDSIGHT else None
                    policy = "static" if policy == HINDSIGHT else policy
                    result = simulate(
                        trace,
                        curves,
                        slots,
                        planner=PLANNERS[planner],
                        policy=policy,
                        pieces=cuts[count],
                        initial=initial,
                        **common,
                    )
                    cached = hit_rate(trace, cache_residents(trace, slots, policy))
                    yield labels, cached if initial is None else result.hit_rate, result


def ways(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Planner, policy and pieces of every replay of a trace."""
    policies = [*arguments.policies, HINDSIGHT]
    chosen = [("plan", policy, count) for count in arguments.pieces for policy in policies]
    others = arguments.policies if arguments.every_pair else ["static"]
    return chosen + [(p, policy, 1) for p in PLANNERS if p != "plan" for policy in others]


def worst(records: list[dict], pieces: int, phase: str) -> str:
    """The plan farthest from the bound, uploads left out, in words."""
    ratios = [
        (row[f"{phase}_over_bound"] or 0.0, [row[key] for key in LABELS])
        for row in records
        if row["planner"] == "plan" and row["pieces"] == pieces
    ]
    ratio, where = max(ratios, default=(1.0, ["nowhere"]))
    return f"{phase} at most {ratio:.3f} of the bound ({', '.join(where)})"


def main() -> None:
    arguments = parse()
    start, records = time.perf_counter(), []
    for labels, cached, result in runs(arguments):
        if not records:
            header = [*labels, "cache", *Simulation.COLUMNS]
            print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
        cells = [str(label) for label in labels.values()]
        print(f"| {' | '.join(cells)} | {cached:.1%} {result}", flush=True)
        records.append({**labels, "cache_hit_rate": cached, **result.record()})
    seconds = time.perf_counter() - start
    print()
    for pieces in arguments.pieces:
        decode, prefill = (worst(records, pieces, phase) for phase in ("decode", "prefill"))
        print(f"pieces {pieces}: {decode}, {prefill}")
    print(f"{len(records)} replays in {seconds:.0f} s; trace of {arguments.steps} steps")
    if arguments.out:
        options = {name: str(value) for name, value in vars(arguments).items()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"options": options, "rows": records}, indent=1))


if __name__ == "__main__":
    command_line.run(main)
