"""One layer of the served model: attention over pages, then experts wherever they are."""

from dataclasses import dataclass, replace
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.cache.paged_kv import LayerKv, write_kv
from moe_jax.config import ModelConfig
from moe_jax.model.attention import project_kv, project_output, project_qkv
from moe_jax.model.dispatch import Dispatch, block_widths, combine, dispatch, gather_rows
from moe_jax.model.experts import LayerExperts, run_experts
from moe_jax.model.ops import gated_ffn, linear, rms_norm
from moe_jax.model.prefetch import link_has_time
from moe_jax.model.router import route_to_pieces
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.model.weights import LayerWeights, SharedExpertWeights
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, Planner, plan_layer
from pallas_kernels.paged_attention import paged_attention


@no_type_check  # jax rebuilds it with other leaves in the fields
@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Routed:
    """A layer call up to its experts: what they are given, and which of them run where.

    Attributes:
      normed: the tokens as router and experts see them.
      gates: what each choice's output is weighted by.
      where: the dispatch, in addresses.
      mode: int32, a `Mode` per address.
      link_has_time: whether one expert more could come over while the layer runs.
    """

    normed: Float[Array, "tokens embed"]
    gates: Float[Array, "tokens choices"]
    where: Dispatch
    mode: Int[Array, " experts"]
    link_has_time: Bool[Array, ""]


def run_layer(
    weights: LayerWeights,
    experts: LayerExperts | None,
    kv: LayerKv,
    x: Float[Array, "tokens embed"],
    step: StepState,
    curves: CostCurves,
    tally: Tally,
    *,
    config: ModelConfig,
    window: int | None,
    max_query_length: int,
    planner: Planner = plan_layer,
    streams: bool = True,
) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
    """Runs one layer on one step's tokens; `experts` is None in a dense layer.

    Without `streams` no expert is streamed, whatever the planner says.
    """
    attention = {"config": config, "window": window, "max_query_length": max_query_length}
    if weights.ffn is not None:
        x, kv = attend(weights, kv, x, step, **attention)
        with jax.named_scope("dense_ffn"):
            normed = rms_norm(x, weights.ffn_norm[...], config.norm_epsilon)
            ffn = weights.ffn
            y = gated_ffn(ffn.gate_up[...], ffn.down[...], normed, config.activation)
            return x + y.astype(x.dtype), kv, tally.after_dense_layer()
    assert experts is not None, "a layer with a router was given no experts"
    place = experts.address, experts.slots
    x, kv, routed, tally = attend_and_route(
        weights, *place, kv, x, step, curves, tally, planner, streams=streams, **attention
    )
    with jax.named_scope("experts"):
        rows = gather_rows(routed.normed, routed.where)
        output = run_experts(experts, rows, routed.where, routed.mode, config.activation, streams)
        return mix(weights, x, output, routed, config), kv, tally


def attend(
    weights: LayerWeights,
    kv: LayerKv,
    x: Float[Array, "tokens embed"],
    step: StepState,
    *,
    config: ModelConfig,
    window: int | None,
    max_query_length: int,
) -> tuple[Float[Array, "tokens embed"], LayerKv]:
    """Adds attention to x, and the tokens' keys and values to the pages."""
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights.attention_norm[...], config.norm_epsilon)
        query, key, value = project_qkv(weights.attention, normed, step.cos, step.sin, config)
        kv = write_kv(kv, step.slot, key, value)
        attended = paged_attention(
            query,
            *kv.by_head(config.attention.head_dim),
            step.block_tables,
            step.query_starts,
            step.kv_lengths,
            scale=config.attention.head_dim**-0.5,
            max_query_length=max_query_length,
            sliding_window=window,
        )
        return x + project_output(weights.attention, attended), kv


def attend_and_route(
    weights: LayerWeights,
    address: Int[Array, " experts"],
    slots: int,
    kv: LayerKv,
    x: Float[Array, "tokens embed"],
    step: StepState,
    curves: CostCurves,
    tally: Tally,
    planner: Planner,
    *,
    config: ModelConfig,
    window: int | None,
    max_query_length: int,
    **routing: Any,
) -> tuple[Float[Array, "tokens embed"], LayerKv, Routed, Tally]:
    """All of a layer with a router that comes before its experts; `routing` is `route_layer`'s."""
    x, kv = attend(
        weights, kv, x, step, config=config, window=window, max_query_length=max_query_length
    )
    with jax.named_scope("experts"):
        normed = rms_norm(x, weights.ffn_norm[...], config.norm_epsilon)
        routed, tally = route_layer(
            weights, address, slots, normed, step, curves, tally, config, planner, **routing
        )
    return x, kv, routed, tally


def extend_kv(
    weights: LayerWeights,
    kv: LayerKv,
    x: Float[Array, "tokens embed"],
    step: StepState,
    config: ModelConfig,
) -> LayerKv:
    """Adds the tokens' keys and values to the pages, which is all that later tokens need of them.

    Of a prompt, no more is needed in the last layer but of its last token.
    """
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights.attention_norm[...], config.norm_epsilon)
        key, value = project_kv(weights.attention, normed, step.cos, step.sin, config)
        return write_kv(kv, step.slot, key, value)


def route_layer(
    weights: LayerWeights,
    address: Int[Array, " experts"],
    slots: int,
    x: Float[Array, "tokens embed"],
    step: StepState,
    curves: CostCurves,
    tally: Tally,
    config: ModelConfig,
    planner: Planner,
    fetched: Int[Array, ""] | None = None,
    streams: bool = True,
    rounded: bool = False,
) -> tuple[Routed, Tally]:
    """Routes the tokens, finds their places in expert order, and plans who runs where.

    The expert at address `fetched` has been brought over already and counts as resident. With
    `rounded`, the blocks suit experts whose products are.
    Whatever the planner says, resident experts run on the device, and a missing expert with tokens
    that is not streamed runs on the host: a plan decides about time, never about the result.
    """
    assert weights.router is not None, "a dense layer was given experts"
    gates, chosen = route_to_pieces(weights.router[...], x, config.moe)
    tokens, choices = chosen.shape
    widths = block_widths(tokens, choices, config.moe.num_experts, rounded)
    where = dispatch(address[chosen], step.valid, config.moe.num_experts, widths)
    resident = jnp.arange(config.moe.num_experts) < slots
    if fetched is not None:
        resident |= jnp.arange(config.moe.num_experts) == fetched
    plan = planner(where.counts, resident, curves)
    may_stream = (plan.mode == Mode.STREAM) & streams
    missing = jnp.where(may_stream, Mode.STREAM.value, Mode.HOST.value)
    mode = jnp.where(resident, Mode.RESIDENT.value, missing)
    mode = jnp.where(where.counts > 0, mode, Mode.IDLE.value).astype(jnp.int32)
    by_expert = jnp.where(step.valid[:, None], gates.astype(jnp.float32), 0)
    by_expert = jnp.zeros(config.moe.num_experts).at[chosen].add(by_expert)
    plan = replace(plan, mode=mode[address])
    tally = tally.after_experts(plan, where.counts[address], by_expert)
    streamed, hosted = mode == Mode.STREAM.value, mode == Mode.HOST.value
    has_time = link_has_time(plan.predicted, streamed, streamed | hosted, curves)
    routed = Routed(normed=x, gates=gates, where=where, mode=mode, link_has_time=has_time)
    return routed, tally


def mix(
    weights: LayerWeights,
    x: Float[Array, "tokens embed"],
    output: Float[Array, "rows embed"],
    routed: Routed,
    config: ModelConfig,
    rounded: bool = False,
) -> Float[Array, "tokens embed"]:
    """Adds to x what the routed experts computed, and the shared expert where there is one."""
    y = combine(output, routed.gates, routed.where).astype(x.dtype)
    if weights.shared is not None:
        y = y + shared_expert(weights.shared, routed.normed, config, rounded)
    return x + y


def shared_expert(
    weights: SharedExpertWeights,
    x: Float[Array, "tokens embed"],
    config: ModelConfig,
    rounded: bool = False,
) -> Float[Array, "tokens embed"]:
    """The expert of every token, scaled by the sigmoid of its gate."""
    # The router multiplies the same activations; XLA:GPU would join both products, of copied
    # weights, before the host computation that this expert can run beside.
    x = lax.optimization_barrier(x)
    ffn = weights.ffn
    y = gated_ffn(ffn.gate_up[...], ffn.down[...], x, config.activation, rounded)
    gate = linear(weights.gate[...], x, rounded=rounded).astype(jnp.float32)
    return jax.nn.sigmoid(gate).astype(x.dtype) * y.astype(x.dtype)
