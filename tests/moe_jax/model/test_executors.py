"""Both executors of a layer give the same, wherever experts run."""

import weakref
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from host_offload.memory import sharding
from moe_jax.cache.paged_kv import allocate_kv
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moe_jax.model import driven as driven_module
from moe_jax.model.compiled import ServedLayer
from moe_jax.model.experts import Expert, ExpertBank, LayerExperts
from moe_jax.model.programs import Programs
from moe_jax.model.step import StepInputs
from moe_jax.model.weights import LayerWeights
from moe_jax.placement.curves import CostCurves
from moe_jax.placement.planner import Mode
from tests.tolerances import assert_close

EXPERTS, EMBED, PAGES, PAGE_SIZE = 6, 16, 8, 16


def make_config(shared_ffn, moe_layers):
    return ModelConfig(
        family="qwen2_moe",
        vocab=50,
        embed=EMBED,
        dense_ffn=24,
        attention=AttentionConfig(heads=4, kv_heads=2, head_dim=8),
        moe=MoEConfig(num_experts=EXPERTS, experts_per_token=3, ffn=12, shared_ffn=shared_ffn),
        rope=RopeConfig(),
        moe_layers=moe_layers,
        windows=(None,) * len(moe_layers),
        max_positions=64,
    )


WAYS = {
    "host": {"host": 1.0, "stream": np.inf},
    "stream": {"host": np.inf, "stream": 1.0},
    "mixed": {"host": 1.0, "stream": 1.0},
}


def make_curves(host, stream, device=1e-3):
    flat = lambda value: jnp.full(2, value, jnp.float32)
    return CostCurves(
        tokens=jnp.array([1.0, 512.0], jnp.float32),
        host=flat(host),
        device=flat(device),
        stream=jnp.float32(stream),
        host_launch=jnp.float32(0),
        link_latency=jnp.float32(0),
        memory=jnp.float32(0),
    )


def make_experts(rng, config, slots, bank):
    draw = lambda shape: rng.standard_normal(shape, np.float32) / np.float32(shape[1] ** 0.5)
    put = lambda kind: Expert(
        *(jax.device_put(draw(shape), sharding(kind)) for shape in config.expert_shapes)
    )
    resident = tuple(put("device") for _ in range(slots))
    if bank:
        resident = ExpertBank(*(jnp.stack(arrays) for arrays in zip(*resident, strict=True)))
    host = tuple(put("pinned_host") for _ in range(EXPERTS - slots))
    return LayerExperts(resident, host, jnp.asarray(rng.permutation(EXPERTS).astype(np.int32)))


class Served:
    """A mixture and a dense layer, or others, under one executor."""

    def __init__(self, executor, slots, bank, shared_ffn, moe_layers=(True, False), prefetch=False):
        rng = np.random.default_rng(8)
        self.config = config = make_config(shared_ffn, moe_layers)
        self.programs = Programs(config, PAGES, PAGE_SIZE, executor=executor, prefetch=prefetch)
        self.embedding = jnp.asarray(rng.standard_normal((config.vocab, EMBED), np.float32))
        self.layers = []
        for index, mixture in enumerate(config.moe_layers):
            weights = LayerWeights(config, index, jnp.dtype(jnp.float32), nnx.Rngs(index))
            graph, state = nnx.split(weights)
            experts = make_experts(rng, config, slots, bank) if mixture else None
            program = self.programs.layer(graph, None)
            self.layers.append(ServedLayer(nnx.to_pure_dict(state), experts, program))

    def run(self, curves):
        """Activations and reports of a prefill of two sequences, then of two decode steps."""
        kv = allocate_kv(self.config, PAGES, jnp.float32)
        tables = np.array([[0, PAGES], [1, PAGES]], np.int32)
        tokens = np.random.default_rng(9).integers(0, self.config.vocab, 16).astype(np.int32)
        found = []
        for lengths, cached in (((9, 6), (0, 0)), ((1, 1), (9, 6)), ((1, 1), (10, 7))):
            bucket, longest = (2, 1) if lengths == (1, 1) else (16, 16)
            starts = np.cumsum([0, *lengths]).astype(np.int32)
            total = np.add(lengths, cached).astype(np.int32)
            step = StepInputs(tokens[:bucket], starts, total, np.ones(2, np.int32), tables)
            x, state, tally = self.programs.embed(self.embedding, step)
            following = (*self.layers[1:], None)
            for i, layer in enumerate(self.layers):
                x, kv[i], tally = layer.program(
                    layer, kv[i], x, state, curves, tally, longest, following[i]
                )
            found.append((np.asarray(x), jax.device_get(tally)))
        return found


KINDS = {
    "separate": dict(slots=2, bank=False, shared_ffn=None),
    "bank": dict(slots=2, bank=True, shared_ffn=20),
    "none": dict(slots=0, bank=False, shared_ffn=None),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """The same layers under both executors."""
    kind = KINDS[request.param]
    return Served("compiled", **kind), Served("driven", **kind), kind


@pytest.mark.parametrize("way", WAYS)
def test_driven_equals_compiled(pair, way):
    """To the bit; where a shared expert is added XLA:CPU sums the three in another order."""
    compiled, driven, kind = pair
    curves = make_curves(**WAYS[way])
    expected, found = compiled.run(curves), driven.run(curves)
    same = assert_close if kind["shared_ffn"] else np.testing.assert_array_equal
    for (x, tally), (expected_x, expected_tally) in zip(found, expected, strict=True):
        assert np.isfinite(x).all()
        same(x, expected_x)
        assert vars(tally).keys() == vars(expected_tally).keys()
        for name, array in vars(expected_tally).items():
            np.testing.assert_array_equal(getattr(tally, name), array, err_msg=name)
    modes = np.stack([tally.modes for _, tally in found])
    assert (modes == Mode.STREAM).any() == (way != "host")
    assert (modes == Mode.HOST).any() == (way != "stream")
    assert (modes == Mode.RESIDENT).any() == (kind["slots"] > 0)


def test_every_part_is_traced_once_per_bucket(pair):
    _, driven, _ = pair
    for way in (*WAYS.values(), *WAYS.values()):
        driven.run(make_curves(**way))
    traces = driven.programs.traces
    assert set(traces.values()) == {1}
    assert Counter(key[0] for key in traces if key[0] not in ("embed", "layer")) == {
        "route": 2,
        "device": 2,
        "host": 2,
        "stream": 2,
        "mix": 4,  # with a host output and without
    }
    assert {key[3] for key in traces if key[0] == "layer"} == {None}  # the dense layer


def test_no_more_than_two_experts_are_in_transit(pair, monkeypatch):
    _, driven, _ = pair
    live, most = [], []
    plain = driven_module.to_device

    def watched(expert):
        """By weak reference: weights that were used and given up do not count."""
        arrived = plain(expert)
        live.append(weakref.ref(arrived.gate_up))
        most.append(sum(one() is not None for one in live))
        return arrived

    monkeypatch.setattr(driven_module, "to_device", watched)
    driven.run(make_curves(**WAYS["stream"]))
    assert len(most) > 10 and max(most) == 2


# The device has so much to do that the link could bring more.
IDLE_LINK = {"host": np.inf, "stream": 0.1, "device": 1.0}


def test_prefetched_experts_change_no_result(monkeypatch):
    layers = dict(slots=2, bank=False, shared_ffn=None, moe_layers=(True, True, False, True))
    plain, ahead = (Served("driven", **layers, prefetch=prefetch) for prefetch in (False, True))
    for _ in range(3):
        expected, found = (one.run(make_curves(**IDLE_LINK)) for one in (plain, ahead))
        for (x, tally), (expected_x, expected_tally) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, expected_x)
            np.testing.assert_array_equal(tally.counts, expected_tally.counts)
    done = ahead.programs.prefetcher
    # Only the first layer is followed by a mixture.
    assert 3 <= done.useful <= done.begun <= 9
    useful = [
        (t.modes[1] == Mode.RESIDENT).sum() - (e.modes[1] == Mode.RESIDENT).sum()
        for (_, t), (_, e) in zip(found, expected, strict=True)
    ]
    assert set(useful) <= {0, 1} and 3 * sum(useful) == done.useful
    assert set(ahead.programs.traces.values()) == {1}

    monkeypatch.setattr(driven_module, "pays", lambda begun, useful: False)
    ahead.run(make_curves(**IDLE_LINK))
    assert (done.begun, done.useful) == (ahead.programs.prefetcher.begun, 3 * sum(useful))
    assert set(ahead.programs.traces.values()) == {1}


def test_nothing_is_prefetched_over_a_busy_link():
    layers = dict(slots=2, bank=False, shared_ffn=None, moe_layers=(True, True))
    ahead = Served("driven", **layers, prefetch=True)
    for way in WAYS.values():
        ahead.run(make_curves(**way))
    assert ahead.programs.prefetcher.begun == 0
