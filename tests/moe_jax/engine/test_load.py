"""Folders and options that cannot be loaded, and what a saved engine gives back."""

import gc
from pathlib import Path

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax.engine.load import reference_model_folder
from moe_jax.engine.sizing import device_memory_for, read_dtype

TOKENS = np.random.default_rng(6).integers(1, 300, (2, 20))


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What was there before is not looked through each time garbage is collected here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def refuse(folder: Path, text: str, **options) -> None:
    """Loading fails with this text; neither files nor arrays are left of it."""
    files, arrays = contents(folder.parent), live_bytes()
    with pytest.raises(ValueError, match=text):
        moe_jax.load(folder, **{"dtype": "float32", "max_tokens": 64, "max_seqs": 3} | options)
    assert contents(folder.parent) == files
    assert live_bytes() <= arrays


@pytest.mark.parametrize(
    "options, text",
    [
        ({"dtype": "float16"}, r"dtype must be one of \['bfloat16', 'float32'\], got 'float16'"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_seqs": -1}, "max_seqs must be a whole number of at least 1, got -1"),
        ({"max_seqs": True}, "max_seqs must be a whole number of at least 1, got True"),
        ({"max_tokens": 4.0}, "max_tokens must be a whole number of at least 1, got 4.0"),
        ({"missing_experts": "disk"}, "must be 'auto', 'stream' or 'host', got 'disk'"),
        ({"missing_experts": None}, "must be 'auto', 'stream' or 'host', got None"),
        ({"device_memory": 1.5}, "a memory size must be a number of bytes or text like"),
        ({"device_memory": "lots"}, "a memory size must be a number of bytes or text like"),
        ({"host_memory": 0}, "a memory size must be positive, got 0"),
    ],
)
def test_options(tiny, options, text):
    refuse(tiny, text, **options)


def test_a_device_budget_that_is_too_small(tiny):
    least = device_memory_for(tiny, experts=0.0, dtype="float32", max_tokens=64, max_seqs=3)
    text = f"budget of .* is 100 B short: dense weights need .* at least {least} bytes, or lower"
    refuse(tiny, text, device_memory=least - 100)


def test_a_host_budget_that_is_too_small(tiny):
    least = device_memory_for(tiny, experts=0.0, dtype="float32", max_tokens=64, max_seqs=3)
    needed = 8 * 3 * 12 * 16 * 4
    text = "the host budget of .* is 100 B short: 8 experts of 2.25 KiB do not fit on the device"
    refuse(tiny, text, device_memory=least, host_memory=needed - 100)


def test_a_missing_folder(tmp_path):
    refuse(tmp_path / "absent", "there is no folder .*absent; checkpoints are not downloaded")


def test_a_folder_that_holds_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "is no checkpoint: looked for")


def test_an_unknown_family(copy):
    refuse(copy(config={"model_type": "llama"}), "model_type must be one of .*; got 'llama'")


@pytest.mark.parametrize("end", ["<eos>", [1, "x"], -1])
def test_an_end_of_text_that_is_no_token(copy, end):
    text = "generation_config.json: eos_token_id must be a token id or a list of token ids"
    refuse(copy(generation_config={"eos_token_id": end}), text)


def damage_header(data: bytearray) -> bytes:
    data[8:12] = b"\xff\xfe{{"
    return bytes(data)


def grow_header(data: bytearray) -> bytes:
    return (1 << 60).to_bytes(8, "little") + bytes(data[8:])


@pytest.mark.parametrize(
    "damage, text",
    [
        (damage_header, "model.safetensors has a broken header"),
        (grow_header, "model.safetensors has a broken header: it claims a header of 1152921504"),
        (lambda data: bytes(data[:-40]), "model.safetensors.*truncated"),
        (lambda data: bytes(data[:5]), "model.safetensors is truncated"),
    ],
    ids=["garbage", "huge", "cut", "empty"],
)
def test_a_damaged_weights_file(copy, damage, text):
    folder = copy()
    file = folder / "model.safetensors"
    file.write_bytes(damage(bytearray(file.read_bytes())))
    refuse(folder, text)


def test_a_broken_tokenizer(copy):
    folder = copy()
    (folder / "tokenizer.json").write_text("{}")
    refuse(folder, "tokenizer.json is not a tokenizer that tokenizers")


def test_a_broken_chat_template(copy):
    folder = copy()
    (folder / "chat_template.jinja").write_text("{% for %}")
    refuse(folder, "chat_template.jinja is not a valid chat template: line 1")


def test_a_saved_engine_comes_back_with_the_same_bits(tiny, engine, tmp_path):
    folder = tmp_path / "saved"
    engine.save(folder)
    back = moe_jax.load(folder, dtype="float32", max_tokens=64, max_seqs=3)
    np.testing.assert_array_equal(back.logits(TOKENS), engine.logits(TOKENS))
    assert back.config == engine.config
    chat = [{"role": "user", "content": "one"}]
    assert back.generate(chat, max_tokens=1).text == engine.generate(chat, max_tokens=1).text
    back.save(tmp_path / "again")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny / name).read_bytes()


def test_saving_refuses_a_folder_in_use(engine, tmp_path):
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="used: it is not empty; name a new or empty folder"):
        engine.save(folder)
    assert contents(tmp_path) == before


def test_the_plan_tells_what_lives_where(tiny):
    budget = device_memory_for(tiny, experts=0.5, dtype="float32", max_tokens=64, max_seqs=3)
    plan = moe_jax.load(tiny, device_memory=budget, dtype="float32", max_tokens=64, max_seqs=3).plan
    lines = str(plan).splitlines()
    assert lines[0].startswith("qwen3_moe: 3 layers, 4 experts (top-2), embed 16, 4 heads, on ")
    assert any("4 of 8, 2 per layer" in line for line in lines)
    assert lines[-5:-2] == [
        "placement      uniform",
        "  layers 0, 2: 2 of 4 resident",
        "  layer 1:     dense",
    ]
    assert lines[-2].startswith("decode         predicted ")
    assert lines[-2].endswith(f"tokens/s for one sequence, limited by {plan.limit}")
    assert lines[-1].startswith("  per token    dense weights ")
    parts = ["dense weights", "experts on the device", "link", "host", "memory"]
    assert list(plan.seconds) == parts and plan.limit in parts
    assert 0 < plan.tokens_per_second < float("inf")


def test_dtypes_have_names():
    assert read_dtype("float32").itemsize == 4
    assert read_dtype("bfloat16").name == "bfloat16"


def test_the_embedded_model_is_a_folder():
    assert (reference_model_folder() / "config.json").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "repetition_penalty": 1.2},
        {"num_beams": 2},
    ],
    ids=["greedy", "counted", "beams"],
)
@pytest.mark.parametrize("cancels", [False, True], ids=["ended", "cancelled"])
def test_an_engine_that_is_dropped_gives_its_memory_back_at_once(tiny, options, cancels):
    """Nobody collects garbage, and a request that has ended is still held."""
    before = live_bytes()
    engine = moe_jax.load(tiny, dtype="float32", max_tokens=64, max_seqs=3)
    handle = engine.submit("many experts", max_tokens=4, **options)
    gc.collect()
    gc.disable()
    try:
        if cancels:
            engine.submit("one mixture", max_tokens=1).result()  # the other has begun by then
            handle.cancel()
        else:
            handle.result()
        held = sum(array.nbytes for array in jax.live_arrays())
        del engine
        left = sum(array.nbytes for array in jax.live_arrays())
    finally:
        gc.enable()
    assert handle.done
    assert left - before < (held - before) / 10
