"""Measures what planning and dispatch cost in a layer, all but its experts and attention.

The first table has the planner alone: a loop of plans is timed against the same loop without them.
The second has a layer's router, dispatch, plan, and the moves of tokens into expert order and back.
The best of several runs counts.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from host_offload.host_compute import compiler_options
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.model.dispatch import gather_rows
from moe_jax.model.layer import mix, route_layer
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import plan_layer

_KNOTS = 10
_INPUTS = 64


def make_curves() -> CostCurves:
    """Made-up costs under which some experts are streamed and some hosted."""
    knots = jnp.asarray(np.geomspace(1, 512, _KNOTS), jnp.float32)
    zero, one = jnp.float32(0), jnp.float32(1)
    return CostCurves(
        tokens=knots,
        host=knots * 1e-3,
        device=jnp.full(_KNOTS, 1e-5),
        stream=one * 1e-3,
        host_launch=zero,
        link_latency=zero,
        memory=zero,
    )


def plan_microseconds(experts: int, choices: int, tokens: int, plans: int, repeats: int) -> float:
    """Of one plan for a layer call with this many tokens, a quarter of the experts resident."""
    curves = make_curves()
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
                return (
                    total + plan.predicted + plan.lower_bound + plan.mode.sum().astype(jnp.float32)
                )

            return jax.lax.fori_loop(0, plans, body, jnp.float32(0))

        times.append(best_seconds(run, repeats, jnp.asarray(counts), resident, curves))
    return (times[1] - times[0]) / plans * 1e6


def dispatch_microseconds(
    experts: int, choices: int, tokens: int, embed: int, layers: int, repeats: int
) -> float:
    """Of everything in a bfloat16 layer but attention and experts, in a program of many layers."""
    config = ModelConfig(
        family="mixtral",
        vocab=8,
        embed=embed,
        dense_ffn=8,
        attention=AttentionConfig(heads=1, kv_heads=1, head_dim=8),
        moe=MoEConfig(num_experts=experts, experts_per_token=choices, ffn=8),
        rope=RopeConfig(),
        moe_layers=(True,),
        windows=(None,),
        max_positions=8,
    )
    graph, state = nnx.split(LayerWeights(config, 0, jnp.dtype(jnp.bfloat16), nnx.Rngs(0)))
    none = jnp.zeros(0)
    step = StepState(
        valid=jnp.ones(tokens, bool),
        slot=none,
        cos=none,
        sin=none,
        query_starts=none,
        kv_lengths=none,
        block_tables=none,
    )
    x = jax.random.normal(jax.random.key(0), (tokens, embed), jnp.bfloat16)

    def run(state, x, step, curves):
        weights = nnx.merge(graph, state)
        address = jnp.arange(experts, dtype=jnp.int32)

        def body(_, carry):
            x, tally = carry
            tally = replace(tally, layer=jnp.int32(0))
            routed, tally = route_layer(
                weights, address, experts // 4, x, step, curves, tally, config, plan_layer
            )
            # In place of the experts: something that needs every row, at next to no cost.
            output = gather_rows(x, routed.where).astype(jnp.float32)
            return mix(weights, x, output, routed, config), tally

        # The tally too: without it the plan would be left out as of no use.
        return jax.lax.fori_loop(0, layers, body, (x, Tally.empty(1, experts)))

    return best_seconds(run, repeats, state, x, step, make_curves()) / layers * 1e6


def best_seconds(function: Callable[..., Any], repeats: int, *arguments: Any) -> float:
    """Seconds of the fastest of several calls, compiled as layers are."""
    program = jax.jit(function, compiler_options=compiler_options())
    jax.block_until_ready(program(*arguments))
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        runs.append(time.perf_counter() - start)
    return min(runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=2000, help="plans per run (2000)")
    parser.add_argument("--repeats", type=int, default=7, help="runs (7)")
    arguments = parser.parse_args()
    command_line.check_least(arguments, plans=1, repeats=1)
    print(f"jax {jax.__version__} on {jax.default_backend()}\n")
    print("| experts | choices | tokens | microseconds per plan |\n|---|---|---|---|")
    for experts, choices in ((8, 2), (64, 8), (128, 8), (512, 10)):
        for tokens in (1, 64):
            cost = plan_microseconds(experts, choices, tokens, arguments.plans, arguments.repeats)
            print(f"| {experts} | {choices} | {tokens} | {cost:.1f} |", flush=True)
    print(
        "\n| experts | choices | tokens | embed | microseconds per layer |\n|---|---|---|---|---|"
    )
    for experts, choices, embed in ((8, 2, 1024), (64, 8, 2048), (128, 8, 2048)):
        for tokens, layers in ((1, 256), (512, 8)):
            cost = dispatch_microseconds(experts, choices, tokens, embed, layers, arguments.repeats)
            print(f"| {experts} | {choices} | {tokens} | {embed} | {cost:.0f} |", flush=True)


if __name__ == "__main__":
    command_line.run(main)
