import json
import re
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax.checkpoint import safetensors_file
from moe_jax.checkpoint.safetensors_file import read_block, read_header


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


def read(file: Path, name: str, skip: int, out: np.ndarray) -> np.ndarray:
    [tensor] = [tensor for tensor in read_header(file) if tensor.name == name]
    with file.open("rb", buffering=0) as stream:
        read_block(stream, tensor, skip, out)
    return out


def test_reads_what_the_library_writes(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, file, metadata={"format": "np"})
    assert {t.name: t.shape for t in read_header(file)} == {k: v.shape for k, v in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(read(file, name, 0, np.empty_like(array)), array)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_converts_and_skips(tmp_path, make_safetensors, monkeypatch, stored, wanted):
    for limit in ("BLOCK_BYTES", "SCRATCH_BYTES"):  # several blocks, the last ragged
        monkeypatch.setattr(safetensors_file, limit, 32)
    stored, wanted = (np.dtype(getattr(ml_dtypes, d, d)) for d in (stored, wanted))
    array = np.random.default_rng(0).standard_normal((7, 5), np.float32).astype(stored)
    file = tmp_path / "model.safetensors"
    make_safetensors(file, {"first": array[:1], "x": array})
    out = read(file, "x", 10, np.full((5, 5), 9, wanted))
    np.testing.assert_array_equal(out, array[2:].astype(wanted))


def test_every_used_dtype_has_a_size():
    for name, dtype in safetensors_file.DTYPES.items():
        assert safetensors_file._BITS[name] == 8 * dtype.itemsize


BROKEN = {
    "short": (b"\0\0\0", "is truncated: .* this file has 3 bytes"),
    "huge": (
        file_of({}, length=1 << 60),
        "claims a header of 1152921504606846976 bytes, .* 2 to 2",
    ),
    "tiny": (file_of({}, length=1), "claims a header of 1 bytes"),
    "not JSON": (file_of(b"{]"), "broken header: Expecting"),
    "not UTF-8": (file_of(b'{"\xff'), "broken header: 'utf-8' codec"),
    "nested": (file_of(b"[" * 100_000), "broken header"),
    "list": (file_of([]), "expected a JSON object"),
    "twice": (file_of(b'{"a": 1, "a": 2}'), "a name occurs twice"),
    "entry": (file_of({"a": 1}), "'a' needs dtype, shape and data_offsets"),
    "extra": (file_of({"a": entry(strides=1)}), "'a' needs .* and nothing else"),
    "dtype": (file_of({"a": entry(dtype="F99")}), "'a' has unknown dtype 'F99'; known are F4"),
    "dtype list": (file_of({"a": entry(dtype=[])}), "unknown dtype"),
    "shape": (file_of({"a": entry(shape=[-1])}), r"'a' has shape \[-1\]"),
    "bool": (file_of({"a": entry(shape=[True])}), r"'a' has shape \[true\]"),
    "long": (file_of({"a": entry(shape=[1] * 999)}), r"'a' has shape \[1, .*\.\.\., expected"),
    "offsets": (file_of({"a": entry(offsets=[8, 0])}), r"data_offsets \[8, 0\]"),
    "one offset": (file_of({"a": entry(offsets=[8])}), r"data_offsets \[8\]"),
    "bytes": (file_of({"a": entry(shape=[3])}, bytes(8)), "'a' .* has 8 bytes, expected 12"),
    "overlap": (
        file_of({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
        "tensor 'b' overlaps the one before it: it begins at byte 135, expected 139",
    ),
    "gap": (file_of({"a": entry(offsets=[4, 12])}, bytes(12)), "tensor 'a' leaves a gap"),
    "truncated": (
        file_of({"a": entry()}, bytes(7)),
        "is truncated: its header describes 77 bytes, the file has 76; download",
    ),
    "trailing": (file_of({"a": entry()}, bytes(9)), "has bytes that belong to no tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(tmp_path, case):
    content, message = BROKEN[case]
    file = tmp_path / "broken.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        read_header(file)


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.safetensors is missing or not a file"):
        read_header(tmp_path / "absent.safetensors")


def test_file_truncated_after_its_header_was_read(tmp_path, make_safetensors):
    file = tmp_path / "model.safetensors"
    make_safetensors(file, {"x": np.zeros(9, np.float32)})
    [tensor] = read_header(file)
    file.write_bytes(file.read_bytes()[:-1])
    with (
        file.open("rb", buffering=0) as stream,
        pytest.raises(ValueError, match=r"model\.safetensors ended inside tensor 'x'"),
    ):
        read_block(stream, tensor, 0, np.empty(9, np.float32))


GOOD = file_of({"a": entry(), "b": entry("BF16", [2, 2], [8, 16])}, bytes(16))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 17), st.binary(min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    ),
    length=st.integers(0, len(GOOD) + 8),
)
@example(changes=[(7, b"\x7f")], length=len(GOOD))
@example(changes=[(3, b"\xff")], length=len(GOOD))
def test_corrupted_headers_raise_or_stay_inside_the_file(tmp_path_factory, changes, length):
    """Whatever the bytes: a ValueError that names the file, or tensors that tile the file."""
    content = bytearray(GOOD)
    for start, replacement in changes:
        content[start : start + len(replacement)] = replacement
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    file.write_bytes(content[:length])
    tracemalloc.start()
    try:
        tensors = read_header(file)
    except ValueError as error:
        assert str(file) in str(error)
    else:
        assert sum(tensor.size for tensor in tensors) <= length
        assert all(tensor.start + tensor.size <= length for tensor in tensors)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1 << 20
