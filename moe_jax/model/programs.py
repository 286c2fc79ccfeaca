"""The jitted programs of a served model: embed, one per kind of layer, head.

Each is traced once per token bucket; `traces` counts how often, so that tests can hold it to that.
"""

import functools
from collections import Counter
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from host_offload.host_compute import compiler_options
from host_offload.memory import sharding
from moe_jax.config import ModelConfig
from moe_jax.model.compiled import LayerExecutor, LayerProgram
from moe_jax.model.driven import DrivenProgram
from moe_jax.model.ops import linear, rms_norm
from moe_jax.model.prefetch import Prefetcher
from moe_jax.model.step import StepInputs, StepState, prepare_step
from moe_jax.model.tally import Tally
from moe_jax.placement.planner import Planner, plan_layer

Executor = Literal["compiled", "driven"]


class Programs:
    """Everything a step calls."""

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        planner: Planner = plan_layer,
        executor: Executor = "compiled",
        prefetch: bool = False,
        streams: bool = True,
    ):
        self.traces: Counter = Counter()
        self._config = config
        self.planner = planner
        self.prefetcher = Prefetcher(on=prefetch)
        driven = functools.partial(DrivenProgram, prefetcher=self.prefetcher)
        compiled = functools.partial(LayerProgram, streams=streams)
        self._executor = driven if executor == "driven" else compiled
        self._layer_programs: dict = {}
        # Named, so that tokens compile the same program whether they come from numpy or the device.
        given = (None, sharding("device"))
        embed = functools.partial(self._embed_step, pages, page_size)
        self._embed = jax.jit(embed, in_shardings=given)
        self._narrow = jax.jit(functools.partial(self._narrow_rows, pages, page_size))
        self._head = jax.jit(self._head_rows, compiler_options=compiler_options())

    def layer(self, graph: nnx.GraphDef, window: int | None) -> LayerExecutor:
        """The program for layers of this structure and attention window."""
        key = graph, window
        if key not in self._layer_programs:
            self._layer_programs[key] = self._executor(
                graph, self._config, window, self.planner, self.traces
            )
        return self._layer_programs[key]

    def embed(
        self, embedding: Float[Array, "vocab embed"], step: StepInputs
    ) -> tuple[Float[Array, "tokens embed"], StepState, Tally]:
        """Looks the tokens up, derives what the layers share, and starts the step's tally."""
        return self._embed(embedding, step)

    def narrow(
        self,
        x: Float[Array, "tokens embed"],
        step: StepInputs,
        rows: Int[np.ndarray, " rows"],
    ) -> tuple[Float[Array, "rows embed"], StepState]:
        """The chosen rows and what a layer needs to go on with them; `step` is of these tokens.

        Their keys and values are not written: they are in the pages.
        """
        return self._narrow(x, step, rows)

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
        self.traces["embed", step.tokens.shape[0], step.kv_lengths.shape[0]] += 1
        state = prepare_step(step, self._config, pages, page_size)
        tally = Tally.empty(self._config.layers, self._config.moe.num_experts)
        return embedding[step.tokens], state, tally

    def _narrow_rows(self, pages, page_size, x, step, rows):
        self.traces["narrow", x.shape[0], rows.shape[0]] += 1
        state = prepare_step(step, self._config, pages, page_size)
        nowhere = jnp.full_like(state.slot, pages * page_size)
        return x[rows], replace(state, slot=nowhere)

    def _head_rows(self, final_norm, unembedding, x, rows):
        self.traces["head", x.shape[0], rows.shape[0]] += 1
        normed = rms_norm(x[rows], final_norm, self._config.norm_epsilon)
        return linear(unembedding, normed, dtype=jnp.float32)
