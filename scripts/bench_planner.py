"""Measures what the planner costs inside a jitted program, by counting experts and choices.

A loop of plans is timed against the same loop without them; the best of several runs counts.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from host_offload.host_compute import compiler_options
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import plan_layer

_KNOTS = 10
_INPUTS = 64


def microseconds(experts: int, choices: int, tokens: int, plans: int, repeats: int) -> float:
    """Of one plan for a layer call with this many tokens, a quarter of the experts resident."""
    knots = jnp.asarray(np.geomspace(1, 512, _KNOTS), jnp.float32)
    zero, one = jnp.float32(0), jnp.float32(1)
    curves = CostCurves(
        tokens=knots,
        host=knots * 1e-3,
        device=jnp.full(_KNOTS, 1e-5),
        stream=one * 1e-3,
        host_launch=zero,
        link_latency=zero,
        memory=zero,
    )
    rng = np.random.default_rng(0)
    counts = np.zeros((_INPUTS, experts), np.int32)
    for row in counts:
        for _ in range(tokens):
            row[rng.choice(experts, choices, replace=False)] += 1
    resident = jnp.arange(experts) < experts // 4

    times = []
    for planned in (False, True):

        def run(counts, resident, curves, planned=planned):
            def body(i, total):
                row = counts[i % _INPUTS]
                if not planned:
                    return total + row.sum().astype(jnp.float32)
                plan = plan_layer(row, resident, curves)
                return total + plan.predicted + plan.mode.sum().astype(jnp.float32)

            return jax.lax.fori_loop(0, plans, body, jnp.float32(0))

        program = jax.jit(run, compiler_options=compiler_options())
        arguments = jnp.asarray(counts), resident, curves
        program(*arguments).block_until_ready()
        runs = []
        for _ in range(repeats):
            start = time.perf_counter()
            program(*arguments).block_until_ready()
            runs.append(time.perf_counter() - start)
        times.append(min(runs))
    return (times[1] - times[0]) / plans * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=2000, help="plans per run (2000)")
    parser.add_argument("--repeats", type=int, default=7, help="runs (7)")
    arguments = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.default_backend()}\n")
    print("| experts | choices | tokens | microseconds per plan |\n|---|---|---|---|")
    for experts, choices in ((8, 2), (64, 8), (128, 8), (512, 10)):
        for tokens in (1, 64):
            cost = microseconds(experts, choices, tokens, arguments.plans, arguments.repeats)
            print(f"| {experts} | {choices} | {tokens} | {cost:.1f} |", flush=True)


if __name__ == "__main__":
    main()
