import json
from pathlib import Path

import pytest

from moe_jax.checkpoint.marker import (
    MARKER,
    Part,
    check_contents,
    list_files,
    part_folder,
    read_marker,
    write_marker,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """One part of one file, without Orbax."""
    file = tmp_path / part_folder(0) / "d" / "data"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"abc")
    files = list_files(tmp_path / part_folder(0))
    assert files == {"d/data": (3, 0x352441C2)}
    write_marker(tmp_path, "bfloat16", [Part({"embedding": (2, 3)}, files)])
    return tmp_path


def test_reads_what_was_written(folder):
    [part] = read_marker(folder)
    assert part == Part({"embedding": (2, 3)}, {"d/data": (3, 0x352441C2)})
    check_contents(folder / part_folder(0), part)
    assert json.loads((folder / MARKER).read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "has format 'other', expected 'moe-jax checkpoint'"),
        (lambda m: m.update(version=2), "has version 2, this library reads 1; install the version"),
        (lambda m: m.update(parts=[]), "is broken: it lists no parts"),
        (lambda m: m.update(parts=[7]), "is broken: a part needs arrays with shapes, files with"),
        (lambda m: m["parts"][0].update(arrays=[]), "is broken: a part needs"),
        (lambda m: m["parts"][0].update(arrays={"a": [-1]}), "is broken: a part needs"),
        (lambda m: m["parts"][0].update(files={"a": [1]}), "is broken: a part needs"),
        (lambda m: m["parts"][0]["files"].update({"../x": [1, 2]}), r"lists '\.\./x', which lies"),
        (lambda m: m["parts"][0]["files"].update({"/x": [1, 2]}), "lists '/x', which lies outside"),
    ],
)
def test_broken_marker(folder, change, message):
    marker = json.loads((folder / MARKER).read_text())
    change(marker)
    (folder / MARKER).write_text(json.dumps(marker))
    with pytest.raises(ValueError, match=f"{MARKER} {message}"):
        read_marker(folder)


def test_marker_that_is_not_json(folder):
    (folder / MARKER).write_bytes(b"\xff")
    with pytest.raises(ValueError, match=f"{MARKER} is not valid JSON"):
        read_marker(folder)
