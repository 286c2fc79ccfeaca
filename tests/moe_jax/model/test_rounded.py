"""A layer in two programs gives what it gives in one, but for the rounding of products."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from host_offload.memory import sharding
from host_offload.rounded_products import rounding_pays
from moe_jax.cache.paged_kv import allocate_kv
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.engine.quantize import store_in_int8
from moe_jax.model import compiled as compiled_module
from moe_jax.model import rounded as rounded_module
from moe_jax.model.compiled import ServedLayer
from moe_jax.model.experts import Expert, LayerExperts
from moe_jax.model.programs import Programs
from moe_jax.model.rounded import products_round, runs_rounded
from moe_jax.model.step import StepInputs
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode
from tests.tolerances import assert_close

EXPERTS, EMBED, FFN, VOCAB, PAGES, PAGE_SIZE = 4, 512, 1024, 50, 16, 16
needs_bfloat16_vectors = pytest.mark.skipif(
    not rounding_pays(jnp.bfloat16), reason="needs a processor where rounded products pay"
)


def make_config(shared_ffn):
    return ModelConfig(
        family="qwen2_moe",
        vocab=VOCAB,
        embed=EMBED,
        dense_ffn=24,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=32),
        moe=MoEConfig(num_experts=EXPERTS, experts_per_token=2, ffn=FFN, shared_ffn=shared_ffn),
        rope=RopeConfig(),
        moe_layers=(True,),
        windows=(None,),
        max_positions=256,
    )


def make_experts(slots, poisoned=()):
    rng = np.random.default_rng(3)
    shapes = ((2 * FFN, EMBED), (EMBED, FFN))

    def draw(address):
        kind = "device" if address < slots else "pinned_host"
        scale = np.nan if address in poisoned else 1
        arrays = (scale * rng.standard_normal(s, np.float32) / np.sqrt(s[1]) for s in shapes)
        return Expert(*(jax.device_put(a.astype(jnp.bfloat16), sharding(kind)) for a in arrays))

    every = [draw(address) for address in range(EXPERTS)]
    address = jnp.arange(EXPERTS, dtype=jnp.int32)
    return LayerExperts(tuple(every[:slots]), tuple(every[slots:]), address)


def make_curves(host, stream):
    flat = lambda value: jnp.full(2, value, jnp.float32)
    return CostCurves(
        tokens=jnp.array([1.0, 512.0], jnp.float32),
        host=flat(host),
        device=flat(1e-3),
        stream=jnp.float32(stream),
        host_launch=jnp.float32(0),
        link_latency=jnp.float32(0),
        memory=jnp.float32(0),
    )


def run(experts, curves, shared_ffn=None, executor="compiled", tokens=128):
    """Activations and report of a prefill of two sequences, and the programs that were traced."""
    config = make_config(shared_ffn)
    programs = Programs(config, PAGES, PAGE_SIZE, executor=executor)
    weights = LayerWeights(config, 0, jnp.dtype(jnp.bfloat16), nnx.Rngs(0))
    graph, state = nnx.split(weights)
    layer = ServedLayer(nnx.to_pure_dict(state), experts, programs.layer(graph, None))
    rng = np.random.default_rng(5)
    embedding = jnp.asarray(rng.standard_normal((VOCAB, EMBED), np.float32), jnp.bfloat16)
    lengths = np.array([tokens - 40, 33], np.int32)
    tables = np.arange(PAGES, dtype=np.int32).reshape(2, -1)
    step = StepInputs(
        rng.integers(0, VOCAB, tokens).astype(np.int32),
        np.cumsum([0, *lengths]).astype(np.int32),
        lengths,
        np.ones(2, np.int32),
        tables,
    )
    (kv,) = allocate_kv(config, PAGES, jnp.bfloat16)
    x, given, tally = programs.embed(embedding, step)
    x, _, tally = layer.program(layer, kv, x, given, curves, tally, tokens)
    return np.asarray(x[: lengths.sum()]), jax.device_get(tally), programs.traces


CURVES = {"host": make_curves(1.0, np.inf), "stream": make_curves(np.inf, 1.0)}


@needs_bfloat16_vectors
@pytest.mark.parametrize(
    "slots, way, shared_ffn",
    [(0, "host", None), (2, "host", 96), (2, "stream", None), (4, "stream", 96)],
)
def test_two_programs_give_what_one_gives(slots, way, shared_ffn, monkeypatch):
    experts, curves = make_experts(slots), CURVES[way]
    x, tally, traces = run(experts, curves, shared_ffn)
    assert Counter(key[0] for key in traces) == {"embed": 1, "route": 1, "experts": 1}
    monkeypatch.setattr(compiled_module, "runs_rounded", lambda *_: False)
    expected_x, expected_tally, traces = run(experts, curves, shared_ffn)
    assert Counter(key[0] for key in traces) == {"embed": 1, "layer": 1}
    assert x.dtype == expected_x.dtype == jnp.bfloat16
    assert_close(x, expected_x)
    assert (x != expected_x).any()  # or nothing was rounded
    for name, array in vars(expected_tally).items():
        np.testing.assert_array_equal(getattr(tally, name), array, err_msg=name)
    modes = {0: set(), 2: {Mode.RESIDENT}, 4: {Mode.RESIDENT}}[slots]
    missing = {Mode.HOST if way == "host" else Mode.STREAM} if slots < EXPERTS else set()
    assert set(tally.modes.ravel().tolist()) == modes | missing


@needs_bfloat16_vectors
def test_placement_changes_nothing():
    """Not even in bfloat16: each expert's blocks are the same, in the same form."""
    ways = ((0, "host"), (2, "stream"), (4, "host"))
    runs = [run(make_experts(slots), CURVES[way])[0] for slots, way in ways]
    for x in runs[1:]:
        np.testing.assert_array_equal(x, runs[0])


def test_the_driven_executor_does_not_round():
    """Where its experts are on the host it cannot, and their places must not matter."""
    (x, _, parts), (expected, _, whole) = (
        run(make_experts(slots), CURVES["host"], executor="driven") for slots in (2, 4)
    )
    np.testing.assert_array_equal(x, expected)
    assert {key[0] for key in parts} == {"embed", "route", "host", "device", "mix"}
    assert {key[0] for key in whole} == {"embed", "layer"}


@needs_bfloat16_vectors
@pytest.mark.parametrize("slots", [0, 4])
def test_experts_nobody_chose_are_never_read(slots, monkeypatch):
    def route(kernel, x, moe):
        chosen = jnp.broadcast_to(jnp.array([0, 2], jnp.int32), (x.shape[0], 2))
        return jnp.full(chosen.shape, 0.5), chosen

    monkeypatch.setattr("moe_jax.model.layer.route_to_pieces", route)
    poisoned, plain = (
        run(make_experts(slots, poisoned=bad), CURVES["host"])[0] for bad in ((1, 3), ())
    )
    assert np.isfinite(plain.astype(np.float32)).all()
    np.testing.assert_array_equal(poisoned, plain)


@pytest.mark.parametrize("tokens, rounds", [(1, False), (64, False), (128, True), (512, True)])
def test_long_steps_round(tokens, rounds, monkeypatch):
    monkeypatch.setattr(rounded_module, "rounding_pays", lambda dtype: dtype == jnp.bfloat16)
    x = jnp.zeros((tokens, EMBED), jnp.bfloat16)
    assert runs_rounded(make_experts(2), x) is rounds
    assert not runs_rounded(make_experts(2), x.astype(jnp.float32))


def test_small_experts_and_int8_do_not_round(monkeypatch):
    monkeypatch.setattr(rounded_module, "rounding_pays", lambda dtype: True)
    assert products_round(3 << 20, jnp.bfloat16, 512)
    assert not products_round((3 << 20) - 1, jnp.bfloat16, 512)
    experts = make_experts(2)
    int8 = LayerExperts(experts.resident, tuple(map(store_in_int8, experts.host)), experts.address)
    assert not runs_rounded(int8, jnp.zeros((512, EMBED), jnp.bfloat16))
