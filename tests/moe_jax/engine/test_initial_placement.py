"""Which experts start on the device, and what a trace must be to decide it."""

import numpy as np
import pytest

import moe_jax
from moe_jax.engine import initial_placement
from moe_jax.engine.arrays import arrays_by_target
from moe_jax.engine.sizing import device_memory_for
from moe_jax.model.experts import ExpertBank
from moe_jax.placement.trace import make_trace, save_trace
from tests.tolerances import assert_close

SIZES = {"dtype": "float32", "max_tokens": 64, "max_seqs": 3}
TOKENS = np.random.default_rng(2).integers(1, 300, 20)


def load(folder, placement, share=0.5):
    budget = device_memory_for(folder, experts=share, **SIZES)
    return moe_jax.load(folder, device_memory=budget, placement=placement, **SIZES)


def residents(engine):
    return [slots.tolist() for slots in engine._observer.mover.residency.slot_expert]


@pytest.mark.parametrize("bank", [False, True], ids=["separate", "bank"])
def test_the_most_used_experts_of_a_profile_start_on_the_device(
    tiny, profile, engine, bank, request
):
    if bank:
        request.getfixturevalue("banks")
    placed = load(tiny, profile)
    assert residents(placed) == [[1, 3], [], [2, 3]]
    assert isinstance(placed._loop.runner.model.layers[0].experts.resident, ExpertBank) == bank
    assert_close(placed.logits(TOKENS), engine.logits(TOKENS))
    stored, expected = (arrays_by_target(e._loop.runner.model) for e in (placed, engine))
    for name, array in expected.items():
        np.testing.assert_array_equal(stored[name], array, err_msg=name)
    assert f"placement      profile {profile}" in str(placed.plan)


def test_a_models_own_trace_raises_its_hits(tiny, engine, tmp_path):
    trace = engine.routing(TOKENS.tolist(), prompt_tokens=4)
    save_trace(trace, tmp_path / "own.npz")
    placed, uniform = load(tiny, str(tmp_path / "own.npz")), load(tiny, "uniform")
    assert residents(uniform) == [[0, 1], [], [0, 1]]
    for one in (placed, uniform):
        one.logits(TOKENS)
    counts = trace.counts.sum(0)
    assert residents(placed)[0] == np.sort(np.argsort(-counts[0], kind="stable")[:2]).tolist()
    assert placed.stats.hit_rate >= uniform.stats.hit_rate


def test_hits_are_expected_as_the_trace_had_them(engine, tiny, profile):
    config, memory = engine.config, load(tiny, "uniform").plan.memory
    placed = initial_placement.place_experts(str(profile), config, memory)
    assert placed.hits == (pytest.approx(0.7), 0.0, pytest.approx(0.8))
    assert initial_placement.place_experts("uniform", config, memory).hits == (0.5, 0.0, 0.5)


def write_trace(path, layers=2, experts=4, chosen=2, steps=1, layer=(0, 2)):
    counts = np.zeros((steps, layers, experts), np.int64)
    counts[..., :chosen] = 1
    save_trace(make_trace(counts, chosen, layer=np.asarray(layer)), path)
    return path


@pytest.mark.parametrize(
    "other, text",
    [
        ({"experts": 8}, "another model: it has 8 as its experts, this model 4; record one with"),
        ({"chosen": 3}, "it has 3 as its experts per token, this model 2"),
        ({"layers": 3, "layer": (0, 1, 2)}, r"it has \[0, 1, 2\] as its layers .* model \[0, 2\]"),
        ({"layer": (0, 1)}, r"it has \[0, 1\] as its layers with experts, this model \[0, 2\]"),
        ({"steps": 0}, "holds no routed token, so it says nothing of use"),
    ],
)
def test_the_trace_of_another_model_is_refused(tiny, tmp_path, other, text):
    with pytest.raises(ValueError, match=text):
        load(tiny, write_trace(tmp_path / "trace.npz", **other))


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def spoil(path):
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(200) + data[middle + 200 :])


@pytest.mark.parametrize(
    "damage, text",
    [
        (cut, "is no routing trace, or damaged"),
        (spoil, "is no routing trace, or damaged"),
        (lambda path: path.write_bytes(b""), "is no routing trace, or damaged"),
        (
            lambda path: path.unlink(),
            "trace.npz cannot be read: No such file .* or leave placement=",
        ),
    ],
    ids=["cut", "spoilt", "empty", "gone"],
)
def test_a_damaged_trace_is_refused(tiny, tmp_path, damage, text):
    path = write_trace(tmp_path / "trace.npz")
    damage(path)
    with pytest.raises(ValueError, match=text):
        load(tiny, path)


@pytest.mark.parametrize("placement", [None, 3, b"uniform", ["uniform"]])
def test_other_things_are_no_placement(tiny, placement):
    with pytest.raises(ValueError, match="must be 'uniform' or the path of a routing trace, got"):
        load(tiny, placement)
