"""One layer of the served model: attention over pages, then experts wherever they are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.cache.paged_kv import LayerKv, write_kv
from moe_jax.config import ModelConfig
from moe_jax.model.attention import project_output, project_qkv
from moe_jax.model.dispatch import block_widths, combine, dispatch, gather_columns
from moe_jax.model.experts import LayerExperts, run_experts
from moe_jax.model.ops import gated_ffn_rows, linear, rms_norm
from moe_jax.model.router import route
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.model.weights import LayerWeights, SharedExpertWeights
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode, Planner, plan_layer
from pallas_kernels.paged_attention import paged_attention


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
) -> tuple[Float[Array, "tokens embed"], LayerKv, Tally]:
    """Runs one layer on one step's tokens; `experts` is None in a dense layer."""
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
        x = x + project_output(weights.attention, attended)
    normed = rms_norm(x, weights.ffn_norm[...], config.norm_epsilon)
    if weights.ffn is not None:
        with jax.named_scope("dense_ffn"):
            ffn = weights.ffn
            y = gated_ffn_rows(ffn.gate_up[...], ffn.down[...], normed, config.activation)
            return x + y, kv, tally.after_dense_layer()
    assert experts is not None, "a layer with a router was given no experts"
    with jax.named_scope("experts"):
        y, tally = mix_experts(weights, experts, normed, step, curves, tally, config, planner)
    return x + y, kv, tally


def mix_experts(
    weights: LayerWeights,
    experts: LayerExperts,
    x: Float[Array, "tokens embed"],
    step: StepState,
    curves: CostCurves,
    tally: Tally,
    config: ModelConfig,
    planner: Planner,
) -> tuple[Float[Array, "tokens embed"], Tally]:
    """Routes, plans and computes the mixture, with the shared expert where there is one.

    Whatever the planner says, resident experts run on the device, and a missing expert with tokens
    that is not streamed runs on the host: a plan decides about time, never about the result.
    """
    assert weights.router is not None, "a dense layer was given experts"
    gates, chosen, _ = route(weights.router[...], x, config.moe)
    widths = block_widths(*chosen.shape, config.moe.num_experts)
    where = dispatch(experts.address[chosen], step.valid, config.moe.num_experts, widths)
    resident = jnp.arange(config.moe.num_experts) < experts.slots
    plan = planner(where.counts, resident, curves)
    missing = jnp.where(plan.mode == Mode.STREAM, Mode.STREAM.value, Mode.HOST.value)
    mode = jnp.where(resident, Mode.RESIDENT.value, missing)
    mode = jnp.where(where.counts > 0, mode, Mode.IDLE.value).astype(jnp.int32)
    columns = gather_columns(x, where)
    columns = run_experts(experts, columns, where, mode, config.activation)
    y = combine(columns, gates, where).astype(x.dtype)
    if weights.shared is not None:
        y = y + shared_expert(weights.shared, x, config)
    routed = jnp.where(step.valid[:, None], gates.astype(jnp.float32), 0)
    by_expert = jnp.zeros(config.moe.num_experts).at[chosen].add(routed)
    plan = replace(plan, mode=mode[experts.address])
    tally = tally.after_experts(plan, where.counts[experts.address], by_expert)
    return y, tally


def shared_expert(
    weights: SharedExpertWeights, x: Float[Array, "tokens embed"], config: ModelConfig
) -> Float[Array, "tokens embed"]:
    """The expert of every token, scaled by the sigmoid of its gate."""
    y = gated_ffn_rows(weights.ffn.gate_up[...], weights.ffn.down[...], x, config.activation)
    return jax.nn.sigmoid(linear(weights.gate[...], x)) * y
