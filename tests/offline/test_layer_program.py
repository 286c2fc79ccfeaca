"""The layer program as compiled for accelerators: weights in place, host work beside it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

pytest.importorskip("libtpu")
pytest.importorskip("jax_plugins.xla_cuda13")

from moe_jax.cache.paged_kv import LayerKv, storage_heads
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from moe_jax.model.layer import run_layer
from moe_jax.model.step import StepState
from moe_jax.model.tally import Tally
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves
from tests.offline.compiler import array, compile_for, host_calls, kernels

pytestmark = pytest.mark.offline

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


def compile_layer(target, tokens, slots, **flags):
    """One layer of 8 experts, `slots` of them resident, the others in pinned host memory."""
    i32, f32, bf16 = jnp.int32, jnp.float32, jnp.bfloat16
    graph, state = nnx.split(nnx.eval_shape(lambda: LayerWeights(CONFIG, 0, jnp.dtype(bf16))))
    parameters = jax.tree.map(lambda x: array(x.shape, x.dtype), nnx.to_pure_dict(state))
    gate_up, down = CONFIG.expert_shapes
    bank = ExpertBank(array((slots, *gate_up), bf16), array((slots, *down), bf16))
    host = Expert(array(gate_up, bf16, "pinned_host"), array(down, bf16, "pinned_host"))
    experts = LayerExperts(
        bank if slots else (), (host,) * (EXPERTS - slots), array((EXPERTS,), i32)
    )
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
    scalar, curve = array((), f32), array((3,), f32)
    curves = CostCurves(
        tokens=curve,
        host=curve,
        device=curve,
        stream=scalar,
        host_launch=scalar,
        link_latency=scalar,
        memory=scalar,
    )

    def layer(parameters, experts, kv, x, step, curves, tally):
        weights = nnx.merge(graph, parameters)
        return run_layer(
            weights,
            experts,
            kv,
            x,
            step,
            curves,
            tally,
            config=CONFIG,
            window=None,
            max_query_length=tokens,
        )

    x, kv, tally = (
        array((tokens, 512), bf16),
        LayerKv(pages, pages),
        Tally(
            layer=array((), i32),
            experts_by_mode=array((4,), i32),
            predicted=scalar,
            counts=array((1, EXPERTS), i32),
            gates=array((1, EXPERTS), f32),
        ),
    )
    return compile_for(target, layer, parameters, experts, kv, x, step, curves, tally, **flags)


@pytest.mark.parametrize("tokens", [1, 128])
@pytest.mark.parametrize("slots", [0, 4])
def test_host_weights_stay_in_place_and_device_work_runs_beside_the_host(
    tokens, slots, monkeypatch
):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiled = compile_layer("h200", tokens, slots, xla_gpu_enable_latency_hiding_scheduler=True)
    ((operands, beside),) = host_calls(compiled)
    assert sum("S(5)" in operand for operand in operands) == 2 * (EXPERTS - slots)
    assert beside
    assert len(kernels(compiled)) >= (3 if slots else 1)
    # At most two experts on their way over; never the bank, never all of the host's.
    expert = 2 * sum(a * b for a, b in CONFIG.expert_shapes)
    assert compiled.temporary_bytes < 4 * expert + (64 << 20) * (tokens > 1)


@pytest.mark.parametrize("tokens", [1, 128])
def test_a_resident_layer_compiles_for_a_tpu_with_both_kernels(tokens, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    compiled = compile_layer("v5e", tokens, EXPERTS)
    assert len(kernels(compiled)) >= 3
