"""The jitted programs of a served model: embed, one per kind of layer, head.

Each is traced once per token bucket; `traces` counts how often, so that tests can hold it to that.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from host_offload.host_compute import compiler_options
from moe_jax.cache.paged_kv import LayerKv
from moe_jax.config import ModelConfig
from moe_jax.model.experts import LayerExperts
from moe_jax.model.layer import run_layer
from moe_jax.model.ops import linear, rms_norm
from moe_jax.model.step import StepInputs, StepState, prepare_step
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Planner, plan_layer


@dataclass(frozen=True)
class ServedLayer:
    """One layer as it lies in memory: its dense parameters, its experts and its program."""

    parameters: dict
    experts: LayerExperts | None
    program: "LayerProgram"


class LayerProgram:
    """Runs the layers of one kind. Donates the KV pages, the activations and the tally."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        config: ModelConfig,
        window: int | None,
        planner: Planner,
        traces: Counter,
    ):
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
            )

        self._run = jax.jit(
            layer,
            static_argnames="max_query_length",
            donate_argnames=("kv", "x", "tally"),
            compiler_options=compiler_options(),
        )

    def __call__(
        self,
        layer: ServedLayer,
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
        curves: CostCurves,
        tally: Tally,
        max_query_length: int,
    ) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
        """DONATES kv, x and tally. Runs one layer on one step's tokens."""
        return self._run(
            layer.parameters,
            layer.experts,
            kv,
            x,
            step,
            curves,
            tally,
            max_query_length=max_query_length,
        )


class Programs:
    """Everything a step calls."""

    def __init__(
        self, config: ModelConfig, pages: int, page_size: int, planner: Planner = plan_layer
    ):
        self.traces: Counter = Counter()
        self._config = config
        self.planner = planner
        self._layer_programs: dict = {}
        self._embed = jax.jit(functools.partial(self._embed_step, pages, page_size))
        self._head = jax.jit(self._head_rows, compiler_options=compiler_options())

    def layer(self, graph: nnx.GraphDef, window: int | None) -> LayerProgram:
        """The program for layers of this structure and attention window."""
        key = graph, window
        if key not in self._layer_programs:
            self._layer_programs[key] = LayerProgram(
                graph, self._config, window, self.planner, self.traces
            )
        return self._layer_programs[key]

    def embed(
        self, embedding: Float[Array, "vocab embed"], step: StepInputs
    ) -> tuple[Float[Array, "tokens embed"], StepState, Tally]:
        """Looks the tokens up, derives what the layers share, and starts the step's tally."""
        return self._embed(embedding, step)

    def head(
        self,
        final_norm: Float[Array, " embed"],
        unembedding: Float[Array, "vocab embed"],
        x: Float[Array, "tokens embed"],
        rows: Int[np.ndarray, " rows"],
    ) -> Float[Array, "rows vocab"]:
        """The float32 logits of the chosen rows."""
        return self._head(final_norm, unembedding, x, rows)

    def _embed_step(self, pages, page_size, embedding, step):
        self.traces["embed", step.tokens.shape[0]] += 1
        state = prepare_step(step, self._config, pages, page_size)
        tally = Tally.empty(self._config.layers, self._config.moe.num_experts)
        return embedding[step.tokens], state, tally

    def _head_rows(self, final_norm, unembedding, x, rows):
        self.traces["head", x.shape[0], rows.shape[0]] += 1
        normed = rms_norm(x[rows], final_norm, self._config.norm_epsilon)
        return linear(unembedding, normed, dtype=jnp.float32)
