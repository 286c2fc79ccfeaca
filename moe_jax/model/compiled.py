"""The executor that makes a layer one device program, host experts included.

The exception are prompts where `moe_jax.model.rounded` is faster.

Knows one layer's arrays; not how many layers there are.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float

from host_offload.host_compute import compiler_options
from moe_jax.cache.paged_kv import LayerKv
from moe_jax.config import ModelConfig
from moe_jax.model.experts import LayerExperts
from moe_jax.model.layer import extend_kv, run_layer
from moe_jax.model.rounded import RoundedProgram, runs_rounded
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Planner


@runtime_checkable
class LayerExecutor(Protocol):
    """Runs the layers of one kind."""

    def __call__(
        self,
        layer: "ServedLayer",
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
        curves: CostCurves,
        tally: Tally,
        max_query_length: int,
        following: "ServedLayer | None" = None,
    ) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
        """DONATES kv, x and tally. Runs one layer on one step's tokens.

        `following` is the layer that comes next, for which something may be prepared.
        """
        ...

    def extend_kv(
        self,
        layer: "ServedLayer",
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
    ) -> LayerKv:
        """DONATES kv. Adds the keys and values of one step's tokens, and runs nothing else."""
        ...


@dataclass(frozen=True)
class ServedLayer:
    """One layer as it lies in memory: its dense parameters, its experts and its program."""

    parameters: dict
    experts: LayerExperts | None
    program: LayerExecutor


class LayerProgram:
    """Runs the layers of one kind. Donates the KV pages, the activations and the tally.

    Without `rounds` products keep float32 results, whatever is faster.
    """

    def __init__(
        self,
        graph: nnx.GraphDef,
        config: ModelConfig,
        window: int | None,
        planner: Planner,
        traces: Counter,
        streams: bool = True,
        rounds: bool = True,
    ):
        self._rounds = rounds

        def layer(parameters, experts, kv, x, step, curves, tally, max_query_length):
            traces["layer", x.shape[0], max_query_length, experts and experts.slots, window] += 1
            weights = nnx.merge(graph, parameters)
            return run_layer(
                weights,
                experts,
                kv,
                x,
                step,
                curves,
                tally,
                config=config,
                window=window,
                max_query_length=max_query_length,
                planner=planner,
                streams=streams,
            )

        def keep(parameters, kv, x, step):
            traces["kv", x.shape[0], window] += 1
            return extend_kv(nnx.merge(graph, parameters), kv, x, step, config)

        options = compiler_options()
        self._run = jax.jit(
            layer,
            static_argnames="max_query_length",
            donate_argnames=("kv", "x", "tally"),
            compiler_options=options,
        )
        self._extend_kv = jax.jit(keep, donate_argnames="kv", compiler_options=options)
        self._rounded = RoundedProgram(graph, config, window, planner, traces, streams)

    def __call__(
        self,
        layer: ServedLayer,
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
        curves: CostCurves,
        tally: Tally,
        max_query_length: int,
        following: ServedLayer | None = None,
    ) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
        """DONATES kv, x and tally. Runs one layer on one step's tokens."""
        experts = layer.experts
        given = kv, x, step, curves, tally
        if self._rounds and experts is not None and runs_rounded(experts, x):
            return self._rounded(layer.parameters, experts, *given, max_query_length)
        return self._run(layer.parameters, experts, *given, max_query_length=max_query_length)

    def extend_kv(
        self,
        layer: ServedLayer,
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
    ) -> LayerKv:
        """DONATES kv. Adds the keys and values of one step's tokens, and runs nothing else."""
        return self._extend_kv(layer.parameters, kv, x, step)
