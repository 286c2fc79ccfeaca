"""How a layer runs a prompt on the CPU backend where rounded products are faster.

Knows one layer's arrays; not how many layers there are.

They are so only in programs in which no product of bfloat16 has results in float32, as attention
and the router want them (`host_offload.rounded_products`). So a layer is two programs:

    route    attention, router, dispatch and plan
    experts  every expert, where it is, and the sum of what they return

They are made of the functions that the one program is made of. What experts compute is rounded to
bfloat16 where Transformers rounds it, too: after each product.
"""

from collections import Counter

import jax
from flax import nnx
from jaxtyping import Array, Float

from host_offload.host_compute import compiler_options
from host_offload.rounded_products import jit_rounded, rounding_pays
from moe_jax.cache.paged_kv import LayerKv
from moe_jax.config import ModelConfig
from moe_jax.model.dispatch import gather_rows
from moe_jax.model.experts import Expert, LayerExperts, run_experts
from moe_jax.model.layer import attend_and_route, mix
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Planner

# In shorter steps, reading the weights takes the time.
_FEWEST_TOKENS = 128
# From jax 0.11 on, XLA:CPU gives oneDNN products of 2^23 multiplications or more; of a block of 16
# rows, those are the products of an expert of this size.
_LEAST_BYTES = 3 << 20


def products_round(expert_bytes: int, dtype: jax.typing.DTypeLike, tokens: int) -> bool:
    """Whether steps of so many tokens run experts of this size and dtype with rounded products."""
    long = tokens >= _FEWEST_TOKENS and expert_bytes >= _LEAST_BYTES
    return long and rounding_pays(dtype)


def runs_rounded(experts: LayerExperts, x: Float[Array, "tokens embed"]) -> bool:
    """Whether a layer with these experts runs these tokens in a `RoundedProgram`."""
    if x.shape[0] < _FEWEST_TOKENS:  # every layer of every step asks
        return False
    one = (*experts.host[:1], *experts.resident[:1])[0]
    if not isinstance(one, Expert):  # products of int8 are YNNPACK's
        return False
    return products_round(one.gate_up.nbytes + one.down.nbytes, x.dtype, x.shape[0])


class RoundedProgram:
    """Runs the layers of one kind. Donates the KV pages, the activations and the tally."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        config: ModelConfig,
        window: int | None,
        planner: Planner,
        traces: Counter,
        streams: bool,
    ):
        def route(parameters, address, kv, x, step, curves, tally, slots, max_query_length):
            traces["route", x.shape[0], max_query_length, slots, window] += 1
            return attend_and_route(
                nnx.merge(graph, parameters),
                address,
                slots,
                kv,
                x,
                step,
                curves,
                tally,
                planner,
                config=config,
                window=window,
                max_query_length=max_query_length,
                streams=streams,
                rounded=True,
            )

        def finish(parameters, experts, x, routed):
            traces["experts", x.shape[0], experts.slots, window] += 1
            weights = nnx.merge(graph, parameters)
            output = run_experts(
                experts,
                gather_rows(routed.normed, routed.where),
                routed.where,
                routed.mode,
                config.activation,
                streams,
                rounded=True,
            )
            return mix(weights, x, output, routed, config, rounded=True)

        self._route = jax.jit(
            route,
            static_argnames=("slots", "max_query_length"),
            donate_argnames=("kv", "x", "tally"),
            compiler_options=compiler_options(),
        )
        self._finish = jit_rounded(finish, donate_argnames="x")

    def __call__(
        self,
        parameters: dict,
        experts: LayerExperts,
        kv: LayerKv,
        x: Float[Array, "tokens embed"],
        step: StepState,
        curves: CostCurves,
        tally: Tally,
        max_query_length: int,
    ) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
        """DONATES kv, x and tally. Runs one layer on one step's tokens."""
        x, kv, routed, tally = self._route(
            parameters,
            experts.address,
            kv,
            x,
            step,
            curves,
            tally,
            slots=experts.slots,
            max_query_length=max_query_length,
        )
        return self._finish(parameters, experts, x, routed), kv, tally
