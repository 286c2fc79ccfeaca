import json
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import open_checkpoint, orbax, save_checkpoint
from moe_jax.checkpoint.marker import MARKER


def bits(array: jax.Array) -> np.ndarray:
    return np.asarray(array).view(np.uint8)


@pytest.fixture
def model(make_folder, load, memory):
    """A Hugging Face folder and its arrays in bfloat16."""
    folder = make_folder()
    return folder.path, load(open_checkpoint(folder.path), "bfloat16", memory)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, make_folder_at, load, memory):
    """The same model saved in several parts."""
    folder = tmp_path_factory.mktemp("saved")
    source = make_folder_at(folder / "model").path
    arrays = load(open_checkpoint(source), "bfloat16", memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax, "PART_BYTES", 500)
        save_checkpoint(folder / "saved", arrays, source)
    return folder / "saved"


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved_once, tmp_path / "saved")


def test_round_trip_keeps_every_bit_and_memory_kind(model, saved, load, memory):
    _, arrays = model
    checkpoint = open_checkpoint(saved)
    assert len(checkpoint.parts) > 3
    restored = load(checkpoint, "bfloat16", memory)
    assert list(restored) == list(arrays)
    for name, array in restored.items():
        assert array.dtype == jnp.bfloat16
        assert array.sharding == memory(name)
        np.testing.assert_array_equal(bits(array), bits(arrays[name]))
    assert checkpoint.config == open_checkpoint(model[0]).config
    assert checkpoint.weight_bytes("bfloat16") == sum(array.nbytes for array in arrays.values())


def test_restores_into_another_memory_kind_and_dtype(model, saved, load, memory):
    _, arrays = model
    elsewhere = lambda name: memory("a.experts.b" if name == "embedding" else "dense")
    for name, array in load(open_checkpoint(saved), "float32", elsewhere).items():
        assert array.sharding == elsewhere(name)
        np.testing.assert_array_equal(array, arrays[name].astype(jnp.float32))


def test_rounds_float32_to_nearest(make_folder, load, memory, tmp_path):
    source = make_folder(dtype="F32").path
    arrays = load(open_checkpoint(source), "float32", memory)
    save_checkpoint(tmp_path / "saved", arrays, source)
    restored = load(open_checkpoint(tmp_path / "saved"), "bfloat16", memory)
    for name, array in restored.items():
        expected = np.asarray(arrays[name]).astype(jnp.bfloat16)
        np.testing.assert_array_equal(bits(array), bits(expected))


def test_copies_config_and_tokenizer_files(model, tmp_path):
    source, arrays = model
    present = ("generation_config.json", "tokenizer.json", "chat_template.jinja")
    for name in (*present, "README.md"):
        (source / name).write_text(name)
    save_checkpoint(tmp_path / "saved", arrays, source)
    found = {path.name for path in (tmp_path / "saved").iterdir()}
    assert found == {"config.json", *present, MARKER, "weights"}
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "tokenizer.json"


def test_a_saved_folder_can_be_saved_again(saved, load, memory, tmp_path):
    arrays = load(open_checkpoint(saved), "bfloat16", memory)
    save_checkpoint(tmp_path / "again", arrays, saved)
    open_checkpoint(tmp_path / "again")


def test_loading_shows_progress(saved, load, memory, capsys):
    load(open_checkpoint(saved), "bfloat16", memory, progress=True)
    assert "100%" in capsys.readouterr().err


def test_saves_into_an_empty_folder_only(model, tmp_path):
    source, arrays = model
    target = tmp_path / "target"
    target.mkdir()
    save_checkpoint(target, arrays, source)
    open_checkpoint(target)
    with pytest.raises(ValueError, match=r"cannot save to .*target: it is not empty; name a new"):
        save_checkpoint(target, arrays, source)
    with pytest.raises(ValueError, match=r"cannot save to .*: it is a file; name a new"):
        save_checkpoint(target / MARKER, arrays, source)
    with pytest.raises(ValueError, match=r"cannot save to .*: create the folder .*absent first"):
        save_checkpoint(tmp_path / "absent" / "saved", arrays, source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("embedding"), r"not those of config\.json: lacking embedding$"),
        (lambda a: a.update(new=a["embedding"]), r"not those of config\.json: not asked for new$"),
        (
            lambda a: a.update(embedding=a["embedding"][:-1]),
            r"cannot save embedding: it is bfloat16\[10, 8\], expected bfloat16\[11, 8\]",
        ),
        (
            lambda a: a.update(final_norm=a["final_norm"].astype(jnp.float32)),
            r"cannot save final_norm: it is float32\[8\], expected bfloat16\[8\]",
        ),
    ],
)
def test_arrays_that_are_not_the_model(model, tmp_path, change, message):
    source, arrays = model
    before = set(tmp_path.iterdir())
    change(arrays)
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path / "saved", arrays, source)
    assert set(tmp_path.iterdir()) == before


class Interrupting(dict):
    """Arrays during whose saving the user presses Ctrl-C."""

    def __getitem__(self, name):
        if name == "unembedding":
            raise KeyboardInterrupt
        return super().__getitem__(name)


def test_interrupt_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "PART_BYTES", 500)
    source, arrays = model
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "saved", Interrupting(arrays), source)
    assert set(tmp_path.iterdir()) == before


SAVE = """
import os, signal, sys, time
from pathlib import Path
import jax
from moe_jax.checkpoint import open_checkpoint, save_checkpoint, orbax
orbax.PART_BYTES = 100
source, target = map(Path, sys.argv[1:])
arrays = {}
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
open_checkpoint(source).load("float32", lambda name: device, arrays.__setitem__)

def hold(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("weights/00001"):
        print("writing", flush=True)
        sys.stdin.readline()
        time.sleep(0.5)  # enough to clean up, which nobody may do yet
        print("there" if os.path.exists(arguments[0]) else "gone", flush=True)

sys.addaudithook(hold)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
save_checkpoint(target, arrays, source)
"""


def test_signal_while_orbax_writes_leaves_nothing(make_folder, tmp_path):
    """It arrives when a thread of Orbax has written the second part but not yet named it."""
    source = make_folder().path
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE, str(source), str(tmp_path / "saved")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGINT)
    output, error = process.communicate("go on\n", timeout=60)
    assert output == "there\n"
    assert "KeyboardInterrupt" in error
    assert list(tmp_path.iterdir()) == [source]


def test_missing_and_damaged_files(saved, load, memory):
    """Every file of every part: without it, shorter, and with one bit of difference."""
    files = [path for path in (saved / "weights").rglob("*") if path.is_file()]
    part = saved / "weights" / "00001"
    for file in (path for path in files if path.is_relative_to(part)):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=rf"{file} is missing; .*{MARKER} lists it"):
            open_checkpoint(saved)
        file.write_bytes(whole + b"x")
        message = rf"{file} is truncated or damaged: it has {len(whole) + 1} bytes, .* {len(whole)}"
        with pytest.raises(ValueError, match=message):
            open_checkpoint(saved)
        if whole:
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(ValueError, match=rf"{file} is damaged: its checksum is not the"):
                load(open_checkpoint(saved), "bfloat16", memory)
        file.write_bytes(whole)
    load(open_checkpoint(saved), "bfloat16", memory)


def test_missing_config(saved):
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"saved/config\.json is missing"):
        open_checkpoint(saved)


def test_config_of_another_model(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"vocab_size": 12}))
    message = rf"{MARKER}: embedding has shape \[11, 8\], config\.json asks for \[12, 8\]"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(saved)
    (saved / "config.json").write_text(json.dumps(config | {"num_experts": 2}))
    message = r"the arrays in .* are not those of config\.json: not asked for layers\.0\.experts\.2"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(saved)


def test_marker_that_lacks_a_part(saved):
    marker = json.loads((saved / MARKER).read_text())
    marker["parts"].pop()
    (saved / MARKER).write_text(json.dumps(marker))
    message = rf"{MARKER} are not those of config\.json: lacking layers\.0\.experts"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(saved)


def test_marker_that_lists_an_array_twice(saved):
    marker = json.loads((saved / MARKER).read_text())
    marker["parts"][1]["arrays"] |= marker["parts"][0]["arrays"]
    (saved / MARKER).write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=rf"{MARKER} is broken: an array lies in two parts"):
        open_checkpoint(saved)


def test_source_is_not_needed_after_saving(saved, model, load, memory):
    shutil.rmtree(model[0])
    load(open_checkpoint(saved), "bfloat16", memory)
