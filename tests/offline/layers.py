"""Layers of a small Mixtral as arguments for compilers: shapes and memory kinds, no numbers."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.cache.paged_kv import LayerKv, storage_heads
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves
from tests.offline.compiler import array

EXPERTS = 8
CONFIG = ModelConfig(
    family="mixtral",
    vocab=320,
    embed=512,
    dense_ffn=32,
    attention=AttentionConfig(heads=8, kv_heads=2, head_dim=64),
    moe=MoEConfig(num_experts=EXPERTS, experts_per_token=2, ffn=1024),
    rope=RopeConfig(),
    moe_layers=(True,),
    windows=(None,),
    max_positions=64,
)
WEIGHTS = tuple(f"bf16[{rows},{columns}]" for rows, columns in CONFIG.expert_shapes)
EXPERT_BYTES = 2 * sum(rows * columns for rows, columns in CONFIG.expert_shapes)


def dense_arguments(tokens, config):
    """A layer's structure, and its parameters, pages, activations and step."""
    i32, f32, bf16 = jnp.int32, jnp.float32, jnp.bfloat16
    graph, state = nnx.split(nnx.eval_shape(lambda: LayerWeights(config, 0, jnp.dtype(bf16))))
    parameters = jax.tree.map(lambda x: array(x.shape, x.dtype), nnx.to_pure_dict(state))
    pages = array((64, 16, *storage_heads(2, 64)), bf16)
    step = StepState(
        valid=array((tokens,), jnp.bool_),
        slot=array((tokens,), i32),
        cos=array((tokens, 32), f32),
        sin=array((tokens, 32), f32),
        query_starts=array((2,), i32),
        kv_lengths=array((1,), i32),
        block_tables=array((1, 64), i32),
    )
    return graph, parameters, LayerKv(pages, pages), array((tokens, 512), bf16), step


def expert_arguments(slots, config):
    """The experts of a layer, the first `slots` resident, the others in pinned host memory."""
    count = config.moe.num_experts
    host = (expert_argument(config, "pinned_host"),) * (count - slots)
    bank = ExpertBank(*(array((slots, *shape), jnp.bfloat16) for shape in config.expert_shapes))
    return LayerExperts(bank if slots else (), host, array((count,), jnp.int32))


def expert_argument(config, kind="device"):
    """One expert."""
    return Expert(*(array(shape, jnp.bfloat16, kind) for shape in config.expert_shapes))


def costs_and_tally(config):
    """Cost curves, and the tally of a step that begins."""
    scalar, curve = array((), jnp.float32), array((3,), jnp.float32)
    curves = CostCurves(
        tokens=curve,
        host=curve,
        device=curve,
        stream=scalar,
        host_launch=scalar,
        link_latency=scalar,
        memory=scalar,
    )
    rows = array((1, 3 * config.moe.num_experts + 2), jnp.float32)
    return curves, Tally(layer=array((), jnp.int32), rows=rows)
